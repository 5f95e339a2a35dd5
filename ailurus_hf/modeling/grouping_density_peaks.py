"""Spatial-aware density-peaks clustering of the tokens of a grid (AiluRus, section 3.2 of arXiv 2311.01197).

Pure functions of tensors. Every token looks only at its `neighborhood_size` nearest grid positions, so time and memory
grow linearly with the number of tokens. All shapes follow from the arguments, never from the data (the one exception,
on the CPU outside `torch.compile`, is explained in `_join_nearest_in_image`).

The published text fixes the steps; the constants and the exact formulas below are this package's choice.
"""

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from .token_groups import take_tokens

_MAX_LINES_BLOCK = 2**19  # most elements of the lines whose distances are computed together (2 MiB)
_MAX_DISTANCE_BLOCK = 2**22  # most elements, per image, of a block of token-to-representative distances (16 MiB)


def neighborhood_offsets(num_axes: int, neighborhood_size: int) -> tuple[tuple[int, ...], ...]:
    """The `neighborhood_size` grid offsets nearest to the origin, itself excluded, by squared length, ties in
    lexicographic order. The place in this tuple, counted from 1, is the offset's *rank*."""
    radius = 1
    while len(ball := _ball(num_axes, radius)) < neighborhood_size:
        radius += 1
    return tuple(sorted(ball, key=lambda offset: (_squared_length(offset), offset))[:neighborhood_size])


def _ball(num_axes: int, radius: int) -> list[tuple[int, ...]]:
    cube = product(range(-radius, radius + 1), repeat=num_axes)
    return [offset for offset in cube if 0 < _squared_length(offset) <= radius**2]


def _squared_length(offset: tuple[int, ...]) -> int:
    return sum(step * step for step in offset)


def neighbor_indices(grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Index of every token's neighbour at every offset: (num_offsets, N) int64, -1 outside the grid."""
    margin = max(abs(step) for offset in offsets for step in offset)
    index = torch.arange(math.prod(grid), device=device).view(grid)
    index = F.pad(index, (margin, margin) * len(grid), value=-1)
    shifted = [
        index[tuple(slice(margin + step, margin + step + size) for step, size in zip(offset, grid, strict=True))]
        for offset in offsets
    ]
    return torch.stack(shifted).flatten(1)


def neighborhood_distances(
    tokens: Tensor, grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], spatial_alpha: float
) -> Tensor:
    """Spatial-aware distance of every token to its neighbours.

    `sigma(i, j) = (alpha + (1 - alpha) * rank_ij / lambda) * ||z_i - z_j||_2 / sqrt(D)`.

    Args:
        tokens: (batch_size, N, hidden_size), float32 or float64.
        grid: sizes of the grid axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        offsets: the neighbourhood, see `neighborhood_offsets`.
        spatial_alpha: weight of the feature distance alone, in [0, 1].

    Returns:
        (batch_size, num_offsets, N), infinite where the neighbour is outside the grid.
    """
    batch_size, _, hidden_size = tokens.shape
    tokens = tokens.view(batch_size, *grid, hidden_size)
    # The distance between two tokens serves both of them, so of two opposite offsets only the first is computed; all of
    # them for some lines of the grid, while these are in the cache, then for the next lines.
    halves = [offset for offset in offsets if tuple(-step for step in offset) not in offsets[: offsets.index(offset)]]
    pairs: dict[tuple[int, ...], list[Tensor]] = {offset: [] for offset in halves}
    for first in range(0, grid[0], lines := _lines_at_once(tokens)):
        for offset in halves:
            here, there = _overlap(offset, grid, range(first, min(first + lines, grid[0])))
            difference = tokens[(slice(None), *here)] - tokens[(slice(None), *there)]
            pairs[offset].append(difference.square_().sum(-1).sqrt())
    by_offset: dict[tuple[int, ...], Tensor] = {}
    for offset in offsets:
        here, there = _overlap(offset, grid)
        if offset in pairs:
            pair = torch.cat(pairs[offset], dim=1)
        else:
            pair = by_offset[tuple(-step for step in offset)][(slice(None), *there)]
        by_offset[offset] = _place(pair, here, grid)
    distances = torch.stack([by_offset[offset] for offset in offsets], dim=1).flatten(2)
    rank = torch.arange(1, len(offsets) + 1, device=tokens.device, dtype=tokens.dtype)
    spatial_weight = spatial_alpha + (1 - spatial_alpha) * rank / len(offsets)
    return distances * (spatial_weight / math.sqrt(hidden_size))[:, None]


def _lines_at_once(tokens: Tensor) -> int:
    """How many lines along the first axis of the grid fit the cache, of tokens (batch_size, *grid, hidden_size); all of
    them on other devices, and in a graph, which each part would make longer."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return tokens.shape[1]
    return max(_MAX_LINES_BLOCK // (tokens[:, 0].numel() or 1), 1)


def _overlap(
    offset: tuple[int, ...], grid: tuple[int, ...], lines: range | None = None
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the positions that have a neighbour at `offset`, and of those neighbours; in some lines of the first
    axis only, if these are given."""
    here, there = [], []
    for axis, (step, size) in enumerate(zip(offset, grid, strict=True)):
        start, length = (max(0, -step), size - abs(step)) if abs(step) < size else (0, 0)
        if axis == 0 and lines is not None:
            stop = min(start + length, lines.stop)
            start = max(start, lines.start)
            length = max(stop - start, 0)
        here.append(slice(start, start + length))
        there.append(slice(start + step, start + step + length) if length else slice(0, 0))
    return tuple(here), tuple(there)


def _place(values: Tensor, here: tuple[slice, ...], grid: tuple[int, ...]) -> Tensor:
    """Embed values given on a sub-rectangle into the whole grid, infinite elsewhere."""
    padding = [(s.start, size - s.start - n) for s, size, n in zip(here, grid, values.shape[1:], strict=True)]
    return F.pad(values, [side for axis in reversed(padding) for side in axis], value=math.inf)


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
    num_tokens = math.prod(grid)
    if tokens.ndim != 3 or tokens.shape[1] != num_tokens:
        raise ValueError(f"tokens must be (batch_size, {num_tokens}, hidden_size) on grid {grid}, got {tokens.shape}")
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"num_clusters must be between 1 and the number of tokens {num_tokens}, got {num_clusters}")
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    # Under autocast the distances of the last step would leave float32: other groups, or none where float16 overflows.
    with maybe_autocast(tokens.device.type, enabled=False):
        offsets = neighborhood_offsets(len(grid), neighborhood_size)
        neighbors = neighbor_indices(grid, offsets, tokens.device)
        distances = neighborhood_distances(tokens, grid, offsets, spatial_alpha)

        log_density = _log_density(distances, num_neighbors)
        peak_distance = _distance_to_denser(distances, neighbors, log_density)
        score = log_density + peak_distance.log()
        ranking = score.sort(dim=1, descending=True, stable=True).indices
        representatives = ranking[:, :num_clusters].sort(dim=1).values

        is_representative = torch.zeros_like(score, dtype=torch.bool).scatter(1, representatives, True)
        assignment, found = _join_nearest_neighbor(distances, neighbors, is_representative)
        return _join_nearest_in_image(tokens, representatives, assignment, found), representatives


def _log_density(distances: Tensor, num_neighbors: int) -> Tensor:
    """Minus the mean distance to the `num_neighbors` nearest neighbours, or to all where there are fewer: (B, N)."""
    if num_neighbors == 1:
        return -distances.amin(1)
    nearest = distances.topk(min(num_neighbors, distances.shape[1]), dim=1, largest=False).values
    exists = nearest.isfinite()
    total = torch.where(exists, nearest, 0.0).sum(1)
    return torch.where(exists.any(1), -total / exists.sum(1), -math.inf)


def _distance_to_denser(distances: Tensor, neighbors: Tensor, log_density: Tensor) -> Tensor:
    """Distance to the nearest denser neighbour; the image's largest finite distance where there is none: (B, N)."""
    index = torch.arange(neighbors.shape[1], device=neighbors.device)
    neighbor_density = log_density[:, neighbors.clamp(min=0)]
    own_density = log_density[:, None]
    is_denser = (neighbor_density > own_density) | ((neighbor_density == own_density) & (neighbors < index))
    nearest = distances.masked_fill(~(is_denser & (neighbors >= 0)), math.inf).amin(1)
    largest = torch.where(distances.isfinite(), distances, 0.0).amax((1, 2))
    return torch.where(nearest == math.inf, largest[:, None], nearest)


def _join_nearest_neighbor(distances: Tensor, neighbors: Tensor, is_representative: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each token to the nearest representative of its neighbourhood, a representative to itself.

    Returns the assignment (B, N), arbitrary but valid where `found` (B, N) is False: no representative around.
    """
    cluster = is_representative.cumsum(1) - 1
    candidate = is_representative[:, neighbors.clamp(min=0)] & (neighbors >= 0)
    nearest = distances.masked_fill(~candidate, math.inf).argmin(1)
    # `neighbors` is (lambda, N): pick, for every image and token, the row that won.
    neighbor = neighbors.expand(distances.shape[0], -1, -1).gather(1, nearest[:, None])[:, 0].clamp(min=0)
    assignment = torch.where(is_representative, cluster, cluster.gather(1, neighbor).clamp(min=0))
    return assignment, candidate.any(1) | is_representative


def _join_nearest_in_image(tokens: Tensor, representatives: Tensor, assignment: Tensor, found: Tensor) -> Tensor:
    """Assign the tokens not `found` to the representative with the smallest feature distance in the whole image."""
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        # Few tokens, often none, lack a representative nearby. Counting them is free on the CPU; elsewhere it would
        # wait for the device, and in a compiled graph it would make a shape depend on data: there, all are compared.
        num_lost = int((~found).sum(1).max())
        if num_lost == 0:
            return assignment
    else:
        num_lost = tokens.shape[1]
    lost = found.sort(dim=1, stable=True).indices[:, :num_lost]
    nearest = _nearest_by_feature(take_tokens(tokens, lost), take_tokens(tokens, representatives))
    joined = torch.where(found.gather(1, lost), assignment.gather(1, lost), nearest)
    return assignment.scatter(1, lost, joined)


def _nearest_by_feature(queries: Tensor, candidates: Tensor) -> Tensor:
    """Index (B, Q) of the nearest of the candidates (B, C, D) to each query (B, Q, D), the first among equals."""
    # Distances by matrix product lose digits to whatever all tokens share: subtract one token from all.
    origin = candidates[:, :1]
    queries, candidates = queries - origin, candidates - origin
    squared_norm = candidates.square().sum(-1)[:, None]
    block = max(_MAX_DISTANCE_BLOCK // candidates.shape[1], 1)
    nearest = [
        torch.baddbmm(squared_norm, part, candidates.transpose(1, 2), alpha=-2).argmin(-1)
        for part in queries.split(block, dim=1)
    ]
    return torch.cat(nearest, dim=1)
