"""Spatial-aware density-peaks clustering of the tokens of a grid (AiluRus, section 3.2 of arXiv 2311.01197).

Pure functions of tensors. Every token looks only at its `neighborhood_size` nearest grid positions, so time and memory
grow linearly with the number of tokens. All shapes follow from the arguments, never from the data (the one exception,
on the CPU outside `torch.compile`, is explained in `_join_nearest_in_image`).

The published text fixes the steps; the constants and the exact formulas below are this package's choice.
"""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from .token_groups import kept, refuse_tracing, table, take_tokens

_MAX_DIFFERENCES_BLOCK = 2**18  # most elements, on the CPU, of the differences computed together (1 MiB): cached
_MAX_DISTANCE_BLOCK = 2**22  # most elements, per image, of a block of token-to-representative distances (16 MiB)


def neighborhood_offsets(num_axes: int, neighborhood_size: int) -> tuple[tuple[int, ...], ...]:
    """The `neighborhood_size` grid offsets nearest to the origin, itself excluded, by squared length, ties in
    lexicographic order. The place in this tuple, counted from 1, is the offset's *rank*."""
    radius = 1
    while len(ball := _ball(num_axes, radius)) < neighborhood_size:
        radius += 1
    return tuple(sorted(ball, key=lambda offset: (_squared_length(offset), offset))[:neighborhood_size])


def offsets_on(grid: tuple[int, ...], neighborhood_size: int) -> tuple[tuple[int, ...], ...]:
    """`neighborhood_offsets`, without those that are longer than any step on the grid."""
    radius = math.isqrt(sum((size - 1) ** 2 for size in grid)) + 1
    if neighborhood_size > 2 * radius * len(grid):  # that many lie on the axes alone
        neighborhood_size = min(neighborhood_size, len(_ball(len(grid), radius)))
    return neighborhood_offsets(len(grid), neighborhood_size)


def _ball(num_axes: int, radius: int) -> list[tuple[int, ...]]:
    cube = product(range(-radius, radius + 1), repeat=num_axes)
    return [offset for offset in cube if 0 < _squared_length(offset) <= radius**2]


def _squared_length(offset: tuple[int, ...]) -> int:
    return sum(step * step for step in offset)


def neighbor_indices(grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Index of every token's neighbour at every offset: (num_offsets, N) int64, -1 outside the grid."""
    steps = torch.tensor(offsets, device=device)
    index = torch.arange(math.prod(grid), device=device)
    neighbors, exists = index, torch.ones_like(index, dtype=torch.bool)
    for axis, size in enumerate(grid):
        rest, step = math.prod(grid[axis + 1 :]), steps[:, axis, None]
        place = index // rest % size + step
        exists = exists & (place >= 0) & (place < size)
        neighbors = neighbors + step * rest
    return torch.where(exists, neighbors, -1)


def neighborhood_distances(
    tokens: Tensor,
    grid: tuple[int, ...],
    offsets: tuple[tuple[int, ...], ...],
    spatial_alpha: float,
    neighborhood_size: int | None = None,
) -> Tensor:
    """Spatial-aware distance of every token to its neighbours.

    `sigma(i, j) = (alpha + (1 - alpha) * rank_ij / lambda) * ||z_i - z_j||_2 / sqrt(D)`.

    Args:
        tokens: (batch_size, N, hidden_size), float32 or float64.
        grid: sizes of the grid axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        offsets: the neighbourhood, see `neighborhood_offsets`.
        spatial_alpha: weight of the feature distance alone, in [0, 1].
        neighborhood_size: lambda; the number of offsets when None.

    Returns:
        (batch_size, num_offsets, N), infinite where the neighbour is outside the grid.
    """
    batch_size, num_tokens, hidden_size = tokens.shape
    bands = kept(_bands, grid, offsets, _differences_at_once(tokens))
    places, nothing = table(_places, grid, offsets, bands, tokens.dtype, like=tokens)
    size = neighborhood_size or len(offsets)
    weight = table(_spatial_weight, len(offsets), size, spatial_alpha, hidden_size, tokens.dtype, like=tokens)
    # The neighbours of a token along the last axis stand beside each other, for the next token one further: windows.
    margin = max(abs(offset[-1]) for offset in offsets)
    padded = F.pad(tokens, (0, 0, margin, margin))
    squares = []
    for band in bands:
        for start in range(0, band.length, band.block):
            length, begin = min(band.block, band.length - start), margin + start
            here = padded[:, None, begin : begin + length]
            there = padded[:, begin + band.shift : begin + band.shift + length + band.width - 1]
            there = there.unfold(1, length, 1).transpose(2, 3)
            squares.append(F.mse_loss(here.expand_as(there), there, reduction="none").sum(-1).flatten(1))
    pairs = torch.cat([*squares, nothing.expand(batch_size, 1)], dim=1).sqrt_()
    distances = pairs.gather(1, places.expand(batch_size, -1)).view(batch_size, len(offsets), num_tokens)
    return distances.mul_(weight)


class _Band(NamedTuple):
    """Pairs of the tokens i < length, so many of them together, with the tokens i + shift + n."""

    length: int
    block: int
    shift: int
    width: int  # how many n


def _bands(grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], most: int) -> tuple[_Band, ...]:
    """All pairs of neighbours, each once, to be computed in parts of at most so many pairs (or one token's).

    The distance between two tokens serves both of them, so of two opposite offsets only the one that leads on in the
    grid's order is among them. Pairs across the end of a line come along and serve nobody.
    """
    steps: dict[tuple[int, ...], list[int]] = {}  # along the last axis, for those along the others
    for offset in offsets:
        forward = max(offset, tuple(-step for step in offset))
        if all(abs(step) < size for step, size in zip(forward, grid, strict=True)):
            steps.setdefault(forward[:-1], []).append(forward[-1])
    bands = []
    for lead, last in steps.items():
        lines, count = _flat_step((*lead, 0), grid), max(last) - min(last) + 1
        bands.append(_Band(math.prod(grid) - lines, max(most // count, 1), lines + min(last), count))
    return tuple(bands)


def _flat_step(offset: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """How far on in the grid's order an offset leads."""
    return sum(step * math.prod(grid[axis + 1 :]) for axis, step in enumerate(offset))


def _places(
    grid: tuple[int, ...],
    offsets: tuple[tuple[int, ...], ...],
    bands: tuple[_Band, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where in the row of all pairs the distance between a token and its neighbour is, (1, num_offsets * N), the last
    place of the row outside the grid; and what stands in that place, (1, 1)."""
    neighbors = neighbor_indices(grid, offsets, device)
    steps = torch.tensor([_flat_step(offset, grid) for offset in offsets], device=device)[:, None]
    first = torch.where(steps > 0, torch.arange(neighbors.shape[1], device=device), neighbors)
    places = torch.full_like(neighbors, sum(band.length * band.width for band in bands))
    begin = 0
    for band in bands:
        window, place = steps.abs() - band.shift, first % band.block
        length = (band.length - first + place).clamp(max=band.block)  # of the part that the token is in
        place = begin + (first - place) * band.width + window * length + place
        inside = (first >= 0) & (first < band.length) & (window >= 0) & (window < band.width) & (neighbors >= 0)
        places = torch.where(inside, place, places)
        begin += band.length * band.width
    return places.view(1, -1), torch.full((1, 1), math.inf, dtype=dtype, device=device)


def _spatial_weight(
    num_offsets: int,
    neighborhood_size: int,
    spatial_alpha: float,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What distances at each offset are multiplied by, (num_offsets, 1)."""
    rank = torch.arange(1, num_offsets + 1, device=device, dtype=dtype)
    weight = spatial_alpha + (1 - spatial_alpha) * rank / neighborhood_size
    return (weight / math.sqrt(hidden_size))[:, None]


def _differences_at_once(tokens: Tensor) -> int:
    """How many pairs of tokens (batch_size, N, hidden_size) are subtracted at once: on the CPU few, for the cache;
    elsewhere so many that with a copy of the tokens they take no more memory than the activation of an MLP, four times
    the tokens; in a graph, where the differences are never in memory, all."""
    if torch.compiler.is_compiling():
        return tokens.shape[1] ** 2
    if tokens.device.type != "cpu":
        return 3 * tokens.shape[1]
    return max(_MAX_DIFFERENCES_BLOCK // (tokens[:, 0].numel() or 1), tokens.shape[1] // 16)


def _neighbor_tables(
    grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], bits: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Index of every token's neighbour at every offset, some token's outside the grid, and 1 where it comes later than
    the token itself, else 0: (num_offsets, N); the indices of the tokens: (N,)."""
    neighbors = neighbor_indices(grid, offsets, device)
    index = torch.arange(neighbors.shape[1], device=device)
    return neighbors.clamp(min=0), (neighbors > index).to(bits), index


@torch.no_grad()
def cluster_tokens(
    tokens: Tensor,
    grid: tuple[int, ...],
    num_clusters: int,
    *,
    num_neighbors: int = 1,
    neighborhood_size: int = 50,
    spatial_alpha: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Choose representative tokens by density peaks and assign every token to one of them.

    Computed in float32 (float64 for float64 tokens), under autocast too, and without gradient. Deterministic: equal
    densities and equal scores are ordered by token index, equal distances by the neighbour's rank. Tokens with NaN or
    infinite features get some valid cluster.

    Args:
        tokens: (batch_size, N, hidden_size), any float dtype. Patch tokens only, row by row.
        grid: sizes of the grid axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        num_clusters: M, from 1 to N.
        num_neighbors: k, how many nearest neighbours make a token's density.
        neighborhood_size: lambda, how many grid positions around a token count as its neighbourhood.
        spatial_alpha: weight of the feature distance alone, in [0, 1]; the rest grows with the neighbour's rank.

    Returns:
        assignment: (batch_size, N) int64, each token's cluster in [0, M).
        representatives: (batch_size, M) int64, each cluster's representative token, in increasing order.

    Raises:
        ValueError: `tokens` does not fit `grid`, or `num_clusters` is outside [1, N].
    """
    refuse_tracing("density_peaks")
    num_tokens = math.prod(grid)
    if tokens.ndim != 3 or tokens.shape[1] != num_tokens:
        raise ValueError(f"tokens must be (batch_size, {num_tokens}, hidden_size) on grid {grid}, got {tokens.shape}")
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"num_clusters must be between 1 and the number of tokens {num_tokens}, got {num_clusters}")
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    # Under autocast the distances of the last step would leave float32: other groups, or none where float16 overflows.
    with maybe_autocast(tokens.device.type, enabled=False):
        offsets = kept(offsets_on, grid, neighborhood_size)
        distances = neighborhood_distances(tokens, grid, offsets, spatial_alpha, neighborhood_size)
        bits = torch.int64 if tokens.dtype == torch.float64 else torch.int32
        neighbors, is_later, index = table(_neighbor_tables, grid, offsets, bits, like=tokens)

        sparsity = _sparsity(distances, num_neighbors)
        score = _distance_to_denser(distances, neighbors, is_later, sparsity).log() - sparsity
        ranking = score.sort(dim=1, descending=True, stable=True).indices
        representatives = ranking[:, :num_clusters].sort(dim=1).values

        joined, found = _join_nearest_neighbor(distances, neighbors, index, representatives)
        assignment = torch.searchsorted(representatives, joined)
        return _join_nearest_in_image(tokens, representatives, assignment, found), representatives


def _sparsity(distances: Tensor, num_neighbors: int) -> Tensor:
    """Minus the logarithm of the density (B, N): mean distance to the `num_neighbors` nearest neighbours, or to all
    where there are fewer, infinite where there are none."""
    if num_neighbors == 1:
        return distances.amin(1)
    nearest = distances.topk(min(num_neighbors, distances.shape[1]), dim=1, largest=False).values
    exists = nearest.isfinite()
    total = torch.where(exists, nearest, 0.0).sum(1)
    return torch.where(exists.any(1), total / exists.sum(1), math.inf)


def _distance_to_denser(distances: Tensor, neighbors: Tensor, is_later: Tensor, sparsity: Tensor) -> Tensor:
    """Distance to the nearest denser neighbour; the image's largest finite distance where there is none: (B, N)."""
    # The bits of numbers >= 0 are in the order of their size: among equals, one more for a later token decides.
    bits = sparsity.view(is_later.dtype)
    is_not_denser = bits[:, neighbors] + is_later > bits[:, None]
    nearest = distances.masked_fill(is_not_denser, math.inf).amin(1)
    return torch.minimum(nearest, distances.nan_to_num(posinf=0.0).amax((1, 2))[:, None])


def _join_nearest_neighbor(
    distances: Tensor, neighbors: Tensor, index: Tensor, representatives: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest representative of each token's neighbourhood (B, N), for a representative itself; arbitrary where
    `found` (B, N) is False: no representative around."""
    is_other = torch.ones_like(distances[:, 0], dtype=torch.bool).scatter_(1, representatives, False)
    nearest, rank = distances.masked_fill(is_other[:, neighbors], math.inf).min(1)
    neighbor = neighbors.take(torch.add(index, rank, alpha=len(index)))  # at the place (rank, index) of the table
    found = is_other <= (nearest < math.inf)  # others only if near
    return torch.where(is_other, neighbor, index), found


def _join_nearest_in_image(tokens: Tensor, representatives: Tensor, assignment: Tensor, found: Tensor) -> Tensor:
    """Assign the tokens not `found` to the representative with the smallest feature distance in the whole image."""
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        # Few tokens, often none, lack a representative nearby. Counting them is free on the CPU; elsewhere it would
        # wait for the device, and in a compiled graph it would make a shape depend on data: there, all are compared.
        num_lost = int((~found).sum(1).max())
        if num_lost == 0:
            return assignment
        lost = found.sort(dim=1, stable=True).indices[:, :num_lost]
        nearest = _nearest_by_feature(tokens, lost, representatives)
        return assignment.scatter(1, lost, torch.where(found.gather(1, lost), assignment.gather(1, lost), nearest))
    return torch.where(found, assignment, _nearest_by_feature(tokens, None, representatives))


def _nearest_by_feature(tokens: Tensor, queries: Tensor | None, candidates: Tensor) -> Tensor:
    """Which of the candidates (B, C) is nearest to each of the queries (B, Q), or to all tokens: places (B, Q) among
    the candidates, the first among equals."""
    # Distances by matrix product lose digits to whatever all tokens share: subtract one token from all.
    tokens = tokens - tokens[:, :1]
    among, asking = take_tokens(tokens, candidates), tokens if queries is None else take_tokens(tokens, queries)
    squared_norm = among.square().sum(-1)[:, None]
    block = max(_MAX_DISTANCE_BLOCK // candidates.shape[1], 1)
    nearest = [
        torch.baddbmm(squared_norm, part, among.transpose(1, 2), alpha=-2).argmin(-1)
        for part in asking.split(block, dim=1)
    ]
    return torch.cat(nearest, dim=1) if len(nearest) > 1 else nearest[0]
