"""Region merging: groups grown from the bottom, along the edges of the grid, cheapest first.

Every token starts as a region. In each of a fixed number of rounds every region picks its cheapest edge to a neighbour,
and some of those picked are contracted: first edges that both ends have picked, then the others, the cheapest first.
Under a strict order of edges the picked ones form a forest, so each contraction takes away exactly one region: the
number of regions after each round is known before, no control flow depends on the data, and all groups are connected on
the grid.

The cost of an edge is that of Ward (1963, J. Am. Stat. Assoc. 58): by how much merging the two regions raises the sum
of squared distances to the means, `n_u n_v / (n_u + n_v) * ||mu_u - mu_v||^2`. Picking each region's cheapest edge is
the step of Boruvka's algorithm.

Pure functions of tensors; sums run over sorted members, minima over unique integers, so that two runs give the same
bits on every device.
"""

import math
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from .token_groups import TokenGroups, flat_index, refuse_tracing, table, unfold_tokens

NUM_FEATURES = 64  # distances are between projections to so many numbers, see `project`
NUM_ROUNDS = 12
_PLACE = 2**31 - 1  # the bits of a key that hold a place, below the 32 of a number
_EDGES_BLOCK = 8192  # edges on the CPU whose costs are computed together: the means at their ends fill 4 MiB
_FIRST = -(2**62)  # brings a key below those of all finite costs, and a broken one above these
_NO_EDGE = 2**63 - 2**31  # above all keys, and with a place that exists


def grid_edges(grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of tokens that are neighbours on a grid, diagonals included: two (num_edges,) int64, each pair once."""
    index = torch.arange(math.prod(grid), device=device).view(grid)
    pairs = []
    for offset in product((-1, 0, 1), repeat=len(grid)):
        if offset <= (0,) * len(grid):  # of two opposite ones, one
            continue
        here = tuple(slice(max(0, -step), size - max(0, step)) for step, size in zip(offset, grid, strict=True))
        there = tuple(slice(max(0, step), size - max(0, -step)) for step, size in zip(offset, grid, strict=True))
        pairs.append(torch.stack([index[here].flatten(), index[there].flatten()]))
    first, second = torch.cat(pairs, dim=1)
    return first, second


def num_regions_after_rounds(num_tokens: int, num_groups: int, protecting: bool = False) -> list[int]:
    """How many regions are left after each round, of `num_tokens` at the beginning and `num_groups` at the end.

    They fall geometrically, at most to half in a round, which the picked edges always allow. With protected tokens,
    which pick none, what is too many falls to half: there are no more of them than `num_groups`.
    """
    counts = [num_tokens]
    if protecting:
        while counts[-1] > num_groups:
            counts.append(counts[-1] - -(-(counts[-1] - num_groups) // 2))
        return counts[1:]
    rounds = max(NUM_ROUNDS, math.ceil(math.log2(num_tokens / num_groups) + 1e-9))
    for step in range(1, rounds + 1):
        planned = round(num_tokens * (num_groups / num_tokens) ** (step / rounds))
        counts.append(max(num_groups, planned, -(-counts[-1] // 2)))
    return sorted(set(counts), reverse=True)[1:]  # of rounds that change nothing, none


def project(tokens: Tensor) -> Tensor:
    """Random signs times features, (batch_size, N, hidden_size) -> (batch_size, N, 64): keeps distances up to a few
    percent (Achlioptas 2003, J. Comput. Syst. Sci. 66), at a fraction of their cost. The same signs on every device."""
    hidden_size = tokens.shape[-1]
    if hidden_size <= NUM_FEATURES:
        return tokens
    return tokens @ table(_signs, hidden_size, tokens.dtype, like=tokens)


def _signs(hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    place = torch.arange(hidden_size * NUM_FEATURES, device=device)
    for _ in range(2):  # a multiplicative hash of each entry's place: integers, so that no generator is needed
        place = ((place >> 16) ^ place) * 0x45D9F3B & 0xFFFFFFFF
    signs = (1 - 2 * (((place >> 16) ^ place) & 1)).to(dtype)
    return signs.view(hidden_size, NUM_FEATURES) / math.sqrt(NUM_FEATURES)


def _flat_edges(grid: tuple[int, ...], batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables for all images in one row of tokens: the tokens at both ends of every edge (batch_size * num_edges * 2,),
    for each end the place of the other one in that table, and twice the tokens (batch_size * N,); all int64."""
    first_token = torch.arange(batch_size, device=device)[:, None, None] * math.prod(grid)
    ends = (torch.stack(grid_edges(grid, device), dim=1) + first_token).flatten()
    return (
        ends,
        torch.arange(ends.numel(), device=device) ^ 1,
        torch.arange(batch_size * math.prod(grid), device=device),
        torch.arange(batch_size * math.prod(grid), device=device),
    )


@torch.no_grad()
def merge_regions(
    tokens: Tensor,
    grid: tuple[int, ...],
    num_groups: int,
    *,
    protect: Tensor | None = None,
    merged: TokenGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """Divide the tokens of a grid into connected regions of alike tokens.

    Computed in float32 (float64 for float64 tokens), under autocast too, and without gradient. Deterministic: edges of
    equal cost are ordered by their place in the grid. Tokens with NaN or infinite features merge last.

    Args:
        tokens: (batch_size, N, hidden_size), any float dtype; patch tokens only, row by row. With `merged`
            (batch_size, K, hidden_size), one for each of K groups.
        grid: sizes of the grid axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        num_groups: M, from 1 to N, with `merged` to K.
        protect: (batch_size, N) bool, tokens of the grid that stay by themselves.
        merged: the groups that are merged already, and that grow on.

    Returns:
        assignment: (batch_size, N) int64, each token's group in [0, M).
        representatives: (batch_size, M) int64, the token nearest to each group's mean, the first among equals; of
            merged ones, the one that stood for it.

    Raises:
        ValueError: `tokens` or `protect` does not fit `grid`; `num_groups` is outside its range; or so many tokens are
            protected that the others do not fit into the groups that are left.
    """
    refuse_tracing("region_merging")
    num_tokens = math.prod(grid) if merged is None else merged.sizes.shape[1]
    if tokens.ndim != 3 or tokens.shape[1] != num_tokens:
        raise ValueError(f"tokens must be (batch_size, {num_tokens}, hidden_size) on grid {grid}, got {tokens.shape}")
    if not 1 <= num_groups <= num_tokens:
        raise ValueError(f"num_groups must be between 1 and the number of tokens {num_tokens}, got {num_groups}")
    shape = (tokens.shape[0], math.prod(grid))
    if protect is not None and (protect.shape != shape or protect.dtype != torch.bool):
        raise ValueError(f"protect must be {shape} bool, got {tuple(protect.shape)} {str(protect.dtype)[6:]}")
    with maybe_autocast(tokens.device.type, enabled=False):
        features = project(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
        # Region of each token of all images: one of its tokens, the region's root.
        edges, others, index, region = table(_flat_edges, grid, shape[0], like=tokens)
        if merged is not None:
            features = unfold_tokens(features, merged)
            roots = flat_index(merged.order.gather(1, merged.starts), shape[1])
            region = roots.gather(1, merged.assignment).flatten()
        # Edges of protected tokens are contracted last of all, where nothing else is left.
        frozen = None if protect is None else protect.flatten()[edges].view(-1, 2).any(-1)
        # The last column is -1 for a region's root, else 0, so that its mean is -1 over the region's size.
        rows = F.pad(features.reshape(-1, features.shape[-1]), (0, 1), value=-1)
        means = rows
        if merged is not None:
            rows[:, -1].masked_fill_(region != index, 0)
            means = _means(rows, region, index)
        for last, depth in _rounds(num_tokens, num_groups, protect is not None, index):
            region, contracts = _contract(means, region, edges, others, index, frozen, shape[0], last, depth)
            rows[:, -1].masked_fill_(contracts, 0)
            means = _means(rows, region, index)
        of_tokens = F.embedding(region, means)
        if protect is not None and not torch.compiler.is_compiling():
            _check_protected(of_tokens[:, -1].view(shape), protect, num_groups)
        number = (region == index).view(shape).cumsum(1) - 1
        assignment = number.flatten().index_select(0, region).view(shape)
        distance = F.mse_loss(rows[:, :-1], of_tokens[:, :-1], reduction="none").sum(-1).view(shape)
        keys = _keys(distance.nan_to_num(nan=math.inf), index[: shape[1]])
        nearest = torch.full_like(assignment[:, :num_groups], _NO_EDGE)
        nearest = nearest.scatter_reduce_(1, assignment, keys, "amin") & _PLACE
        if merged is not None:
            nearest = merged.representatives.gather(1, merged.assignment.gather(1, nearest))
        return assignment, nearest


def _rounds(num_tokens: int, num_groups: int, protecting: bool, index: Tensor) -> list[tuple[Any, int]]:
    """For each round how many regions it merges into others, and how often `_roots` has to double its steps. In a graph
    the former is a tensor and the latter the same in all rounds, so that they are compiled once."""
    counts = [num_tokens, *num_regions_after_rounds(num_tokens, num_groups, protecting)]
    merged = [before - after for before, after in pairwise(counts)]
    depths = [(count - 1).bit_length() for count in merged]
    if torch.compiler.is_compiling():
        return [(torch.full((1,), count - 1, device=index.device), max(depths)) for count in merged]
    return [(slice(count - 1, count), depth) for count, depth in zip(merged, depths, strict=True)]


@torch.compiler.nested_compile_region  # no two arguments may be the same tensor
def _contract(
    means: Tensor,
    region: Tensor,
    edges: Tensor,
    others: Tensor,
    index: Tensor,
    frozen: Tensor | None,
    batch_size: int,
    last: Any,
    depth: int,
) -> tuple[Tensor, Tensor]:
    """One round: the regions after it, and which tokens are roots no longer, each (batch_size * N,)."""
    ends = region.index_select(0, edges)
    partner, turn = _pick(_edge_keys(means, ends, others, frozen), ends, index)
    turn = turn.view(batch_size, -1)
    contracts = (turn <= turn.sort(dim=1).values[:, last]).flatten()
    return _roots(torch.where(contracts, partner, index), depth).index_select(0, region), contracts


def _keys(values: Tensor, places: Tensor) -> Tensor:
    """Unique integers, in the order of values that are all >= 0 or all <= 0 (the latter by size), equal ones by their
    places, which are in the low bits. The bits of floating-point numbers of one sign are in the order of their size."""
    return torch.add(places, values.float().view(torch.int32), alpha=_PLACE + 1)


def _edge_keys(means: Tensor, ends: Tensor, others: Tensor, frozen: Tensor | None) -> Tensor:
    """Keys of Ward's cost between the regions at both ends of every edge, one for each end, with the place of the other
    end; broken and protected edges come behind all finite ones, edges inside a region behind these."""
    pairs = ends.view(-1, 2)
    in_cache = means.device.type == "cpu" and not torch.compiler.is_compiling()  # else fewer operations are better
    costs = [_minus_costs(means, part) for part in (pairs.split(_EDGES_BLOCK) if in_cache else (pairs,))]
    cost = torch.cat(costs) if len(costs) > 1 else costs[0]
    cost = cost.nan_to_num(nan=math.inf, neginf=math.inf)
    if frozen is not None:
        cost = cost.masked_fill(frozen, math.inf)
    cost = cost.masked_fill(ends[::2] == ends[1::2], math.nan)
    return _keys(cost[:, None], others.view(-1, 2)).flatten()


def _minus_costs(means: Tensor, pairs: Tensor) -> Tensor:
    """Minus Ward's cost for pairs of regions (num_pairs, 2): (num_pairs,). Finite ones are negative, so that their bits
    are negative integers, with room for the others above them."""
    rows = F.embedding(pairs, means)
    distance = F.mse_loss(rows[:, 0, :-1], rows[:, 1, :-1], reduction="none").sum(-1)
    return distance / (rows[:, 0, -1] + rows[:, 1, -1])


def _pick(keys: Tensor, ends: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """For each region, at its root, the region that its cheapest edge leads to, and a key for the turn of that edge;
    `_NO_EDGE` where the edge counts for the other region, and at all other tokens."""
    best = torch.full_like(index, _NO_EDGE).scatter_reduce_(0, ends, keys, "amin")
    partner = ends.index_select(0, best & _PLACE)
    answer = best.index_select(0, partner)
    # Where two regions pick the same edge, their keys differ in the last bit. It counts once, and before other edges.
    turn = torch.add(best, (best ^ answer) == 1, alpha=_FIRST)
    return partner, turn.masked_fill_(answer > best, _NO_EDGE)


def _roots(parent: Tensor, depth: int) -> Tensor:
    """The end of each token's chain of parents, which is at most 2^depth long."""
    for _ in range(depth):  # each doubles the steps taken
        parent = parent.index_select(0, parent)
    return parent


def _means(rows: Tensor, region: Tensor, index: Tensor) -> Tensor:
    """Means (num_tokens, width) of the rows of each region, at the place of its root."""
    ordered, order = region.sort(stable=True)
    return F.embedding_bag(order, rows, torch.searchsorted(ordered, index), mode="mean")


def _check_protected(weights: Tensor, protect: Tensor, num_groups: int) -> None:
    """Raise ValueError where protected tokens had to merge: -1 over the size of each token's group (batch_size, N)."""
    if bool((weights[protect] > -1).any()):
        raise ValueError(
            f"num_groups={num_groups} groups must have room for the protected tokens, up to "
            f"{int(protect.sum(1).max())} in an image, and for each part that they cut off; keep more tokens, or "
            "protect fewer"
        )
