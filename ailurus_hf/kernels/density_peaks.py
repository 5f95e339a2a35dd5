"""Density peaks in five launches; the plain reference is `modeling.grouping_density_peaks.cluster_tokens`.

Distances are computed as there: direct differences, squared and summed in float32, so that the distance between two
tokens is the same from both sides and that of equal tokens is zero. Sums are of another, fixed order: where two
distances, densities or scores differ by less than the rounding of a sum, the kernels may decide otherwise than the
plain operations; equal ones are equal in both, and ordered alike. Tokens with NaN or infinite features have no
neighbours here, and get some valid group.
"""

import math

import torch
from torch import Tensor

from ..modeling.grouping_density_peaks import _spatial_weight, neighbor_indices, neighborhood_offsets
from ..modeling.token_groups import kept, table
from ..utils.extras import needs_extra
from .launching import INTERPRETED, blocks, launch, power_of_2, rows, tile
from .token_groups import token_groups

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

MOST_NEIGHBORS = 256
_PAIRS = tile(256)  # of a token and a neighbour in one program
_FEATURES = 32  # of each pair at once: 64 differences for each of 128 threads
_LARGEST = 1024  # partial maxima read at once
_TOKENS, _OTHERS = tile(16), 128  # whose scores one program compares at once: 16 pairs for each of 128 threads
_FAR_TOKENS, _FAR_OTHERS = tile(4), 64  # which one program compares where none is near, 256 pairs as above
_SPLITS = 2 if INTERPRETED else 8  # programs that share the search in the whole image for the same tokens
_WARPS = 4
_NOTHING = tl.constexpr(2**63 - 1)
_INFINITY = tl.constexpr(math.inf)


@triton.jit
def _pair_distances(row, other, is_pair, of_all, row_stride, hidden_size, FEATURES: tl.constexpr):
    """Squared distances between tokens, given by pointers to their rows (K, 1), and others, places (K, L)."""
    total = tl.zeros(other.shape, tl.float32)
    for begin in range(0, hidden_size, FEATURES):
        feature = begin + tl.arange(0, FEATURES)
        inside = feature < hidden_size
        here = tl.load(row + feature[None], mask=inside[None], other=0).to(tl.float32)
        place = other.to(tl.int64)[:, :, None] * row_stride + feature[None, None]
        there = tl.load(of_all + place, mask=is_pair[:, :, None] & inside[None, None], other=0).to(tl.float32)
        difference = here[:, None] - there
        total += tl.sum(difference * difference, axis=2)
    return total


@triton.jit
def _distances_kernel(
    tokens,
    neighbors,
    weights,
    distances,
    sparsity,
    largest,
    num_tokens,
    hidden_size,
    num_neighbors,
    num_offsets,
    batch_stride,
    row_stride,
    TOKENS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: the distances of some tokens to all their neighbours, and their sparsity."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, rank = block * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OFFSETS)
    exists = token < num_tokens
    place = token[:, None] * num_offsets + rank[None]
    listed = exists[:, None] & (rank < num_offsets)[None]
    neighbor = tl.load(neighbors + place, mask=listed, other=-1)
    of_image = tokens + image * batch_stride
    row = of_image + tl.where(exists, token, 0).to(tl.int64)[:, None] * row_stride
    total = _pair_distances(row, neighbor, neighbor >= 0, of_image, row_stride, hidden_size, FEATURES)
    distance = tl.sqrt_rn(total) * tl.load(weights + rank, mask=rank < num_offsets, other=0)[None]
    distance = tl.where((neighbor >= 0) & (distance < _INFINITY), distance, _INFINITY)
    tl.store(distances + image * num_tokens * num_offsets + place, distance, mask=listed)
    tl.store(largest + image * tl.num_programs(0) + block, tl.max(tl.where(distance < _INFINITY, distance, 0)))

    mean, found = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    for _ in range(num_neighbors):
        nearest = tl.min(distance, axis=1)
        mean += tl.where(nearest < _INFINITY, nearest, 0)
        found += (nearest < _INFINITY).to(tl.float32)
        first = tl.min(tl.where(distance == nearest[:, None], rank[None], OFFSETS), axis=1)
        distance = tl.where(rank[None] == first[:, None], _INFINITY, distance)
    mean = tl.where(found > 0, tl.div_rn(mean, tl.maximum(found, 1)), _INFINITY)
    tl.store(sparsity + image * num_tokens + token, mean, mask=exists)


@triton.jit
def _scores_kernel(
    distances,
    neighbors,
    sparsity,
    largest,
    scores,
    num_tokens,
    num_offsets,
    num_largest,
    TOKENS: tl.constexpr,
    OFFSETS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: the distance of some tokens to the nearest denser one, and their scores."""
    image = tl.program_id(1).to(tl.int64)
    token, rank = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OFFSETS)
    exists = token < num_tokens
    part, most = tl.arange(0, LARGEST), tl.zeros([LARGEST], tl.float32)
    for begin in range(0, num_largest, LARGEST):
        inside = begin + part < num_largest
        most = tl.maximum(most, tl.load(largest + image * num_largest + begin + part, mask=inside, other=0))
    place = token[:, None] * num_offsets + rank[None]
    listed = exists[:, None] & (rank < num_offsets)[None]
    distance = tl.load(distances + image * num_tokens * num_offsets + place, mask=listed, other=_INFINITY)
    neighbor = tl.load(neighbors + place, mask=listed, other=-1)
    own = tl.load(sparsity + image * num_tokens + token, mask=exists, other=0)
    its = tl.load(sparsity + image * num_tokens + neighbor, mask=neighbor >= 0, other=_INFINITY)
    denser = (its < own[:, None]) | ((its == own[:, None]) & (neighbor < token[:, None]))
    reach = tl.minimum(tl.min(tl.where(denser, distance, _INFINITY), axis=1), tl.max(most))
    logarithm = tl.where(reach > 0, tl.log(tl.where(reach > 0, reach, 1)), -_INFINITY)
    tl.store(scores + image * num_tokens + token, logarithm - own, mask=exists)


@triton.jit
def _choose_kernel(
    scores,
    chosen,
    joined,
    num_tokens,
    num_clusters,
    TOKENS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: whether some tokens are among the best, by how many are better."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    own = tl.load(scores + image * num_tokens + token, mask=exists, other=0)[:, None]
    better = tl.zeros([TOKENS, OTHERS], tl.int32)
    for begin in range(0, num_tokens, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        among = (other < num_tokens)[None]
        its = tl.load(scores + image * num_tokens + other, mask=other < num_tokens, other=0)[None]
        before = (its > own) | ((its == own) & (other[None] < token[:, None]))
        better += (among & before).to(tl.int32)
    is_chosen = tl.sum(better, axis=1) < num_clusters
    tl.store(chosen + image * num_tokens + token, is_chosen.to(tl.int8), mask=exists)
    tl.store(joined + image * num_tokens + token, tl.full([TOKENS], _NOTHING, tl.int64), mask=exists)


@triton.jit
def _join_kernel(
    tokens,
    distances,
    neighbors,
    chosen,
    joined,
    num_tokens,
    hidden_size,
    num_offsets,
    batch_stride,
    row_stride,
    TOKENS: tl.constexpr,
    OTHERS: tl.constexpr,
    OFFSETS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: the representative that some tokens join, in the neighbourhood; where there is none, the nearest of
    a share of the image, as the smallest of keys that have the place in their low bits."""
    split, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, rank = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, OFFSETS)
    exists = token < num_tokens
    place = token[:, None] * num_offsets + rank[None]
    listed = exists[:, None] & (rank < num_offsets)[None]
    neighbor = tl.load(neighbors + place, mask=listed, other=-1)
    is_chosen = chosen + image * num_tokens
    near = tl.load(is_chosen + neighbor, mask=neighbor >= 0, other=0) != 0
    distance = tl.load(distances + image * num_tokens * num_offsets + place, mask=listed, other=_INFINITY)
    distance = tl.where(near, distance, _INFINITY)
    nearest = tl.min(distance, axis=1)
    first = tl.min(tl.where(distance == nearest[:, None], rank[None], OFFSETS), axis=1)
    neighbor = tl.load(neighbors + token * num_offsets + first, mask=exists, other=0)
    itself = tl.load(is_chosen + token, mask=exists, other=1) != 0
    found = itself | (nearest < _INFINITY)
    keys = joined + image * num_tokens + token
    if split == 0:
        tl.store(keys, tl.where(itself, token, neighbor).to(tl.int64), mask=exists & found)
    if tl.max((exists & ~found).to(tl.int32)) > 0:
        of_image = tokens + image * batch_stride
        row = of_image + tl.where(exists, token, 0).to(tl.int64)[:, None] * row_stride
        best = tl.full([TOKENS], _NOTHING, tl.int64)
        for begin in range(split * OTHERS, num_tokens, tl.num_programs(1) * OTHERS):
            other = begin + tl.arange(0, OTHERS)
            among = tl.load(is_chosen + other, mask=other < num_tokens, other=0) != 0
            if tl.max(among.to(tl.int32)) > 0:
                pair = tl.broadcast_to(other[None], [TOKENS, OTHERS])
                is_pair = tl.broadcast_to(among[None], [TOKENS, OTHERS])
                total = _pair_distances(row, pair, is_pair, of_image, row_stride, hidden_size, FEATURES)
                total = tl.where(total < _INFINITY, total, _INFINITY)  # no NaN
                key = (total.to(tl.int32, bitcast=True).to(tl.int64) << 31) + pair
                best = tl.minimum(best, tl.min(tl.where(is_pair, key, _NOTHING), axis=1))
        tl.atomic_min(keys, best, mask=exists & ~found, sem="relaxed")


def _neighbors(grid: tuple[int, ...], offsets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Index of every token's neighbour at every offset: (N, num_offsets) int32, -1 outside the grid."""
    return neighbor_indices(grid, offsets, device).T.int().contiguous()


def density_peaks(
    tokens: Tensor,
    grid: list[int],
    num_clusters: int,
    num_neighbors: int,
    neighborhood_size: int,
    spatial_alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenGroups` that density peaks find; arguments as of `cluster_tokens`, which names them.

    Raises:
        ValueError: `tokens` is float64, or `neighborhood_size` above 256.
    """
    if tokens.dtype == torch.float64 or neighborhood_size > MOST_NEIGHBORS:
        raise ValueError(
            f"tokens must be float32 or lower and neighborhood_size at most {MOST_NEIGHBORS}, got {tokens.dtype} and "
            f"{neighborhood_size}; cluster_tokens takes all"
        )
    tokens = rows(tokens)
    batch_size, num_tokens, hidden_size = tokens.shape
    offsets = kept(neighborhood_offsets, len(grid), neighborhood_size)
    neighbors = table(_neighbors, tuple(grid), offsets, like=tokens)
    sizes = neighborhood_size, neighborhood_size, spatial_alpha, hidden_size
    weights = table(_spatial_weight, *sizes, torch.float32, like=tokens)
    padded = power_of_2(neighborhood_size)
    num_blocks = blocks(num_tokens, _PAIRS // padded)
    distances = tokens.new_empty(batch_size, num_tokens, neighborhood_size, dtype=torch.float32)
    sparsity, scores = (tokens.new_empty(batch_size, num_tokens, dtype=torch.float32) for _ in range(2))
    largest = tokens.new_empty(batch_size, num_blocks, dtype=torch.float32)
    chosen = tokens.new_empty(batch_size, num_tokens, dtype=torch.int8)
    joined = tokens.new_empty(batch_size, num_tokens, dtype=torch.int64)
    strides = tokens.stride(0), tokens.stride(1)
    launch(
        _distances_kernel,
        tokens,
        (num_blocks, batch_size),
        *(tokens, neighbors, weights, distances, sparsity, largest),
        *(num_tokens, hidden_size, min(num_neighbors, neighborhood_size), neighborhood_size, *strides),
        TOKENS=_PAIRS // padded,
        OFFSETS=padded,
        FEATURES=_FEATURES,
        num_warps=_WARPS,
    )
    launch(
        _scores_kernel,
        tokens,
        (num_blocks, batch_size),
        *(distances, neighbors, sparsity, largest, scores),
        *(num_tokens, neighborhood_size, num_blocks),
        TOKENS=_PAIRS // padded,
        OFFSETS=padded,
        LARGEST=_LARGEST,
        num_warps=_WARPS,
    )
    launch(
        _choose_kernel,
        tokens,
        (blocks(num_tokens, _TOKENS), batch_size),
        *(scores, chosen, joined, num_tokens, num_clusters),
        TOKENS=_TOKENS,
        OTHERS=_OTHERS,
        num_warps=_WARPS,
    )
    launch(
        _join_kernel,
        tokens,
        (blocks(num_tokens, _FAR_TOKENS), _SPLITS, batch_size),
        *(tokens, distances, neighbors, chosen, joined),
        *(num_tokens, hidden_size, neighborhood_size, *strides),
        TOKENS=_FAR_TOKENS,
        OTHERS=_FAR_OTHERS,
        OFFSETS=padded,
        FEATURES=_FEATURES,
        num_warps=_WARPS,
    )
    return token_groups(joined, num_clusters)


density_peaks_op = torch.library.custom_op("ailurus::density_peaks", density_peaks, mutates_args=())


@density_peaks_op.register_fake
def _(
    tokens: Tensor,
    grid: list[int],
    num_clusters: int,
    num_neighbors: int,
    neighborhood_size: int,
    spatial_alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_tokens, of_groups = tokens.shape[:2], (tokens.shape[0], num_clusters)
    shapes = (of_tokens, of_groups, of_groups, of_tokens, of_groups)
    return tuple(tokens.new_empty(shape, dtype=torch.int64) for shape in shapes)  # type: ignore[return-value]
