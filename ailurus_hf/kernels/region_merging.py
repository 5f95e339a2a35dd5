"""Region merging in two launches a round; the plain reference is `modeling.grouping_region_merging.merge_regions`.

The means of regions are those of the plain operations bit for bit (sums in the order of the tokens, then a division),
and so are all decisions between whole numbers. The sum of a cost runs in another, fixed order: where two costs differ
by less than its rounding, the kernels may decide otherwise; equal differences have equal costs in both, ordered alike.
"""

import torch
from torch import Tensor

from ..modeling.grouping_region_merging import grid_edges, num_regions_after_rounds
from ..modeling.token_groups import table
from ..utils.extras import needs_extra
from .launching import blocks, launch, power_of_2, tile
from .token_groups import PLACE, token_groups

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

_TOKENS = 256  # of a program that fills
_EDGES = tile(32)  # of a program, with 64 features at both ends: 16 differences for each of 128 threads
_REGIONS = tile(1)  # of a program: they differ in size
_WINDOW = 128  # tokens among which the members of a region are looked for at once, by one warp
_TOKENS_OF_A_WARP = 512  # in the program that contracts
_FIRST = tl.constexpr(-(2**62))  # as in the reference
_NO_EDGE = tl.constexpr(2**63 - 2**31)
_LOWEST = tl.constexpr(-(2**63))
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _start_kernel(region, best, weights, arrived, num_tokens, TOKENS: tl.constexpr):
    """Every token is a region: its root, its best edge, minus one over its size; and no program has arrived."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    place, exists = image * num_tokens + token, token < num_tokens
    tl.store(region + place, token, mask=exists)
    tl.store(best + place, tl.full([TOKENS], _NO_EDGE, tl.int64), mask=exists)
    tl.store(weights + place, tl.full([TOKENS], -1, tl.float32), mask=exists)
    tl.store(arrived + image, 0)


@triton.jit(do_not_specialize=["num_merged", "num_doublings"])
def _contract_kernel(
    means,
    edges,
    region,
    best,
    weights,
    parent,
    arrived,
    num_tokens,
    num_edges,
    num_features,
    num_merged,
    num_doublings,
    EDGES: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: some edges, whose costs are offered to the regions at both ends. The one that comes last in an
    image contracts the edges that were picked."""
    image = tl.program_id(1).to(tl.int64)
    region += image * num_tokens
    best += image * num_tokens
    edge, feature = tl.program_id(0) * EDGES + tl.arange(0, EDGES), tl.arange(0, FEATURES)[None]
    exists = edge < num_edges
    first = tl.load(region + tl.load(edges + 2 * edge, mask=exists, other=0))
    second = tl.load(region + tl.load(edges + 2 * edge + 1, mask=exists, other=0))
    apart, row = exists & (first != second), means + image * num_tokens * num_features + feature
    inside = apart[:, None] & (feature < num_features)
    difference = tl.load(row + first.to(tl.int64)[:, None] * num_features, mask=inside, other=0)
    difference -= tl.load(row + second.to(tl.int64)[:, None] * num_features, mask=inside, other=0)
    weight = tl.load(weights + image * num_tokens + first) + tl.load(weights + image * num_tokens + second)
    cost = tl.div_rn(tl.sum(difference * difference, axis=1), weight)  # minus Ward's: its bits are negative integers
    cost = tl.where(cost > -_INFINITY, cost, _INFINITY)
    key = (cost.to(tl.int32, bitcast=True).to(tl.int64) << 31) + 2 * edge
    tl.atomic_min(best + first, key + 1, mask=apart, sem="relaxed")
    tl.atomic_min(best + second, key, mask=apart, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(arrived + image, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _contract(edges, region, best, parent + image * num_tokens, num_tokens, num_merged, num_doublings, TOKENS)
        tl.store(arrived + image, 0)


@triton.jit
def _contract(edges, region, best, parent, num_tokens, num_merged, num_doublings, TOKENS: tl.constexpr):
    """Contract the first `num_merged` of the edges picked in an image; all regions' best edges are forgotten."""
    token = tl.arange(0, TOKENS)
    exists = token < num_tokens
    # Written by atomic operations of other programs: past the first cache.
    own = tl.load(best + token, mask=exists, other=_NO_EDGE, cache_modifier=".cg")
    partner = tl.load(region + tl.load(edges + (own & PLACE)))
    answer = tl.load(best + partner, cache_modifier=".cg")
    turn = tl.where((own ^ answer) == 1, own + _FIRST, own)
    turn = tl.where(answer > own, _NO_EDGE, turn)

    # The num_merged-th smallest turn, bit by bit: the largest number below which there are fewer.
    last = tl.where(tl.sum((turn < 0).to(tl.int32)) < num_merged, 0, _LOWEST).to(tl.int64)
    bit = tl.full([], 2**62, tl.int64)
    for _ in range(63):
        last = tl.where(tl.sum((turn < last + bit).to(tl.int32)) < num_merged, last + bit, last)
        bit = bit >> 1

    root = tl.where(turn <= last, partner, token)
    tl.store(parent + token, root, mask=exists)
    for _ in range(num_doublings):
        tl.debug_barrier()
        root = tl.load(parent + root, mask=exists, other=0)
        tl.debug_barrier()
        tl.store(parent + token, root, mask=exists)
    tl.debug_barrier()
    root = tl.load(parent + tl.load(region + token, mask=exists, other=0), mask=exists, other=0)
    tl.debug_barrier()
    tl.store(region + token, root, mask=exists)
    tl.store(best + token, tl.full([TOKENS], _NO_EDGE, tl.int64), mask=exists)


@triton.jit
def _means_kernel(
    features,
    region,
    means,
    weights,
    nearest,
    num_tokens,
    num_features,
    NEAREST: tl.constexpr,
    REGIONS: tl.constexpr,
    WINDOW: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: the means of the regions whose roots some tokens are, and the members nearest to them."""
    image = tl.program_id(1).to(tl.int64)
    root = tl.program_id(0) * REGIONS + tl.arange(0, REGIONS)
    region += image * num_tokens
    is_root = tl.load(region + root, mask=root < num_tokens, other=-1) == root
    if tl.max(is_root.to(tl.int32)) > 0:
        own, feature = tl.where(is_root, root, -2)[:, None], tl.arange(0, FEATURES)[None]
        inside, row = feature < num_features, features + image * num_tokens * num_features + feature
        total, size = tl.zeros([REGIONS, FEATURES], tl.float32), tl.zeros([REGIONS], tl.int32)
        for begin in range(0, num_tokens, WINDOW):
            place = begin + tl.arange(0, WINDOW)[None]
            member = tl.load(region + place, mask=place < num_tokens, other=-1) == own
            count = tl.sum(member.to(tl.int32), axis=1)
            size += count
            for _ in range(tl.max(count)):
                first = tl.min(tl.where(member, place, num_tokens), axis=1)[:, None]
                here = (first < num_tokens) & inside
                total += tl.load(row + first.to(tl.int64) * num_features, mask=here, other=0)
                member = member & (place > first)
        count = tl.maximum(size, 1).to(tl.float32)
        mean = tl.div_rn(total, tl.broadcast_to(count[:, None], total.shape))
        written = means + (image * num_tokens + root[:, None]) * num_features + feature
        tl.store(written, mean, mask=is_root[:, None] & inside)
        tl.store(weights + image * num_tokens + root, tl.div_rn(tl.zeros_like(count) - 1, count), mask=is_root)
        if NEAREST:
            best, chosen = tl.full([REGIONS], _INFINITY, tl.float32), root
            for begin in range(0, num_tokens, WINDOW):
                place = begin + tl.arange(0, WINDOW)[None]
                member = tl.load(region + place, mask=place < num_tokens, other=-1) == own
                for _ in range(tl.max(tl.sum(member.to(tl.int32), axis=1))):
                    first = tl.min(tl.where(member, place, num_tokens), axis=1)
                    here = (first < num_tokens)[:, None] & inside
                    difference = tl.load(row + first.to(tl.int64)[:, None] * num_features, mask=here, other=0) - mean
                    distance = tl.sum(tl.where(here, difference * difference, 0), axis=1)
                    closer = (first < num_tokens) & (distance < best)
                    chosen, best = tl.where(closer, first, chosen), tl.where(closer, distance, best)
                    member = member & (place > first[:, None])
            tl.store(nearest + image * num_tokens + root, chosen, mask=is_root)


def _edges(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """The tokens at both ends of every edge: (num_edges, 2) int32."""
    return torch.stack(grid_edges(grid, device), dim=1).int()


def region_merging(features: Tensor, grid: list[int], num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenGroups` that region merging finds.

    Args:
        features: (batch_size, N, num_features) float32, at most 64 features.
        grid, num_groups: as of `merge_regions`, below N.
    """
    features = features.contiguous()
    batch_size, num_tokens, num_features = features.shape
    edges = table(_edges, tuple(grid), like=features)
    region, parent, nearest = (features.new_empty(batch_size, num_tokens, dtype=torch.int32) for _ in range(3))
    best = features.new_empty(batch_size, num_tokens, dtype=torch.int64)
    weights, means = features.new_empty(batch_size, num_tokens), torch.empty_like(features)
    arrived = features.new_empty(batch_size, dtype=torch.int32)
    padded, held = max(power_of_2(num_features), 2), power_of_2(num_tokens)
    launch(
        _start_kernel,
        features,
        (blocks(num_tokens, _TOKENS), batch_size),
        *(region, best, weights, arrived, num_tokens),
        TOKENS=_TOKENS,
        num_warps=4,
    )
    of_regions, num_regions = features, num_tokens
    for num_left in num_regions_after_rounds(num_tokens, num_groups):
        num_merged = num_regions - num_left
        launch(
            _contract_kernel,
            features,
            (blocks(edges.shape[0], _EDGES), batch_size),
            *(of_regions, edges, region, best, weights, parent, arrived),
            *(num_tokens, edges.shape[0], num_features, num_merged, (num_merged - 1).bit_length()),
            EDGES=_EDGES,
            FEATURES=padded,
            TOKENS=held,
            num_warps=min(max(held // _TOKENS_OF_A_WARP, 4), 32),
        )
        launch(
            _means_kernel,
            features,
            (blocks(num_tokens, _REGIONS), batch_size),
            *(features, region, means, weights, nearest, num_tokens, num_features),
            NEAREST=num_left == num_groups,
            REGIONS=_REGIONS,
            WINDOW=_WINDOW,
            FEATURES=padded,
            num_warps=1,
        )
        of_regions, num_regions = means, num_left
    return token_groups(region, num_groups, nearest)


region_merging_op = torch.library.custom_op("ailurus::region_merging", region_merging, mutates_args=())


@region_merging_op.register_fake
def _(features: Tensor, grid: list[int], num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_tokens, of_groups = features.shape[:2], (features.shape[0], num_groups)
    shapes = (of_tokens, of_groups, of_groups, of_tokens, of_groups)
    return tuple(features.new_empty(shape, dtype=torch.int64) for shape in shapes)  # type: ignore[return-value]
