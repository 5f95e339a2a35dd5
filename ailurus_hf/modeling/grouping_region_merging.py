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
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from .token_groups import TokenGroups

NUM_FEATURES = 64  # distances are between projections to so many numbers, see `project`
NUM_ROUNDS = 12
_INDEX_BITS = 31  # of a key, below the 31 bits of a cost
_PLACE = 2**_INDEX_BITS - 1
_LATER = 2**62  # above both
_NO_EDGE = torch.iinfo(torch.int64).max
_LARGEST = torch.finfo(torch.float32).max


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
    place = torch.arange(hidden_size * NUM_FEATURES, device=tokens.device)
    for _ in range(2):  # a multiplicative hash of each entry's place: integers, so that no generator is needed
        place = ((place >> 16) ^ place) * 0x45D9F3B & 0xFFFFFFFF
    signs = (1 - 2 * (((place >> 16) ^ place) & 1)).to(tokens.dtype)
    return tokens @ (signs.view(hidden_size, NUM_FEATURES) / math.sqrt(NUM_FEATURES))


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
        first, second = grid_edges(grid, tokens.device)
        # Edges of protected tokens are contracted last of all, where nothing else is left.
        frozen = None if protect is None else protect[:, first] | protect[:, second]
        of_inputs = torch.arange(num_tokens, device=tokens.device).expand(tokens.shape[0], -1)
        region = of_inputs if merged is None else merged.assignment  # of each token of the grid
        sizes = torch.ones_like(features[..., 0]) if merged is None else merged.sizes.to(features.dtype)
        sums = features if merged is None else features * sizes[..., None]
        for num_regions in num_regions_after_rounds(num_tokens, num_groups, protect is not None):
            ends = region[:, first], region[:, second]
            target = _contract(_edge_keys(sums, sizes, *ends, frozen), *ends, sums.shape[1], num_regions)
            sums, sizes = _sum_members(torch.cat([sums, sizes[..., None]], dim=-1), target, num_regions).split(
                [sums.shape[-1], 1], dim=-1
            )
            sizes, of_inputs = sizes[..., 0], target.gather(1, of_inputs)
            region = of_inputs if merged is None else target.gather(1, region)
        if protect is not None and not torch.compiler.is_compiling():
            _check_protected(sizes.gather(1, region), protect, num_groups)
        distance = (features - _rows(sums / sizes[..., None], of_inputs)).square().sum(-1)
        nearest = torch.full_like(of_inputs[:, :num_groups], _NO_EDGE)
        nearest = nearest.scatter_reduce(1, of_inputs, _keys(distance), "amin") & _PLACE
        return region, nearest if merged is None else merged.representatives.gather(1, nearest)


def _keys(values: Tensor) -> Tensor:
    """Unique integers (batch_size, K) in the order of values >= 0, equal ones by their place, which is in the low bits;
    NaN counts as the largest."""
    values = values.nan_to_num(nan=_LARGEST, posinf=_LARGEST).clamp(max=_LARGEST).float().contiguous()
    return (values.view(torch.int32).long() << _INDEX_BITS) | torch.arange(values.shape[1], device=values.device)


def _edge_keys(sums: Tensor, sizes: Tensor, first: Tensor, second: Tensor, frozen: Tensor | None) -> Tensor:
    """Keys (batch_size, num_edges) of Ward's cost between the regions at both ends; `_NO_EDGE` inside a region."""
    means = sums / sizes[..., None]
    sizes_first, sizes_second = sizes.gather(1, first), sizes.gather(1, second)
    distance = _rows(means, first).sub_(_rows(means, second)).square_().sum(-1)
    cost = distance * (sizes_first * sizes_second / (sizes_first + sizes_second))
    if frozen is not None:
        cost = cost.masked_fill(frozen, math.inf)
    keys = torch.where(cost < _LARGEST, _keys(cost), _keys(cost) | _LATER)  # of broken and protected tokens
    return keys.masked_fill(first == second, _NO_EDGE)


def _contract(keys: Tensor, first: Tensor, second: Tensor, num_regions: int, num_left: int) -> Tensor:
    """The new region, in [0, num_left), of each old one: (batch_size, num_regions) int64."""
    index = torch.arange(num_regions, device=keys.device).expand(keys.shape[0], -1)
    best = torch.full_like(index, _NO_EDGE)
    best = best.scatter_reduce(1, first, keys, "amin").scatter_reduce(1, second, keys, "amin")
    edge = (best & _PLACE).clamp(max=keys.shape[1] - 1)
    partner = torch.where(best == _NO_EDGE, index, first.gather(1, edge) + second.gather(1, edge) - index)
    is_mutual = best.gather(1, partner) == best
    # Where two regions pick the same edge it counts once, for the second of them, and before all other edges.
    picked = torch.where(is_mutual, best, best | _LATER).masked_fill(is_mutual & (index <= partner), _NO_EDGE)
    last = picked.sort(dim=1).values[:, num_regions - num_left - 1, None]
    parent = torch.where(picked <= last, partner, index)
    for _ in range(max(1, math.ceil(math.log2(num_regions)))):  # to the end of the longest possible chain
        parent = parent.gather(1, parent)
    return ((parent == index).cumsum(1) - 1).gather(1, parent)


def _sum_members(values: Tensor, target: Tensor, num_regions: int) -> Tensor:
    """Sums (batch_size, num_regions, width) of the values (batch_size, K, width) that go to each region."""
    batch_size, num_values, width = values.shape
    ordered, order = target.sort(dim=1, stable=True)
    edges = torch.arange(num_regions, device=target.device).expand(batch_size, -1).contiguous()
    offset = torch.arange(batch_size, device=target.device)[:, None] * num_values
    starts = torch.searchsorted(ordered, edges) + offset
    total = F.embedding_bag((order + offset).flatten(), values.reshape(-1, width), starts.flatten(), mode="sum")
    return total.view(batch_size, num_regions, width)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (batch_size, K, width) at (batch_size, T) -> (batch_size, T, width)."""
    batch_size, num_values, width = values.shape
    offset = torch.arange(batch_size, device=values.device)[:, None] * num_values
    return F.embedding(index + offset, values.reshape(-1, width))


def _check_protected(sizes: Tensor, protect: Tensor, num_groups: int) -> None:
    """Raise ValueError where protected tokens had to merge: `sizes` (batch_size, N) are those of each token's group."""
    if bool((sizes[protect] > 1).any()):
        raise ValueError(
            f"num_groups={num_groups} groups must have room for the protected tokens, up to "
            f"{int(protect.sum(1).max())} in an image, and for each part that they cut off; keep more tokens, or "
            "protect fewer"
        )
