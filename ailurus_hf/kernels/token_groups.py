"""`TokenGroups` from which token each token joined; the plain reference is `modeling.token_groups.group_tokens`."""

import torch
from torch import Tensor

from ..utils.extras import needs_extra
from .launching import blocks, launch, tile

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

PLACE = tl.constexpr(2**31 - 1)  # the bits of a key that hold a place, below the 32 of a number; as in `modeling`
_TOKENS = tile(16)  # of a program
_OTHERS = 128  # that these are compared with at once: 16 pairs a thread
_WARPS = 4


@triton.jit
def _groups_kernel(
    joined,
    nearest,
    assignment,
    sizes,
    representatives,
    order,
    starts,
    num_tokens,
    num_groups,
    NEAREST: tl.constexpr,
    TOKENS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: some tokens, each of which counts how many others come before it, and how many are with it."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < num_tokens
    keys = joined + image * num_tokens
    root = (tl.load(keys + token, mask=exists, other=0) & PLACE).to(tl.int32)
    here, own = token[:, None], root[:, None]
    number = tl.zeros([TOKENS, OTHERS], tl.int32)
    start, place, size = number, number, number
    for begin in range(0, num_tokens, OTHERS):
        other = begin + tl.arange(0, OTHERS)
        among = other < num_tokens
        its = (tl.load(keys + other, mask=among, other=PLACE) & PLACE).to(tl.int32)[None]  # of none: behind all
        there = other[None]
        number += ((its == there) & (there < own)).to(tl.int32)
        start += (its < own).to(tl.int32)
        place += ((its == own) & (there < here)).to(tl.int32)
        size += (its == own).to(tl.int32)
    group = image * num_groups + tl.sum(number, axis=1)
    first = tl.sum(start, axis=1)
    tl.store(assignment + image * num_tokens + token, group - image * num_groups, mask=exists)
    tl.store(order + image * num_tokens + first + tl.sum(place, axis=1), token.to(tl.int64), mask=exists)
    is_root = exists & (root == token)
    tl.store(sizes + group, tl.sum(size, axis=1).to(tl.int64), mask=is_root)
    tl.store(starts + group, first.to(tl.int64), mask=is_root)
    chosen = tl.load(nearest + image * num_tokens + token, mask=is_root) if NEAREST else token
    tl.store(representatives + group, chosen.to(tl.int64), mask=is_root)


def token_groups(
    joined: Tensor, num_groups: int, nearest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenGroups`, groups numbered by the place of the token that others joined. One launch.

    Args:
        joined: (batch_size, N) integers whose low 31 bits are the place of the token that each token joined; those
            joined have joined themselves.
        num_groups: M, how many different ones there are in every image.
        nearest: (batch_size, N) integers, at the places of those joined the token that stands for the group; None for
            themselves.
    """
    batch_size, num_tokens = joined.shape
    assignment, order = (joined.new_empty(joined.shape, dtype=torch.int64) for _ in range(2))
    sizes, representatives, starts = (joined.new_empty(batch_size, num_groups, dtype=torch.int64) for _ in range(3))
    launch(
        _groups_kernel,
        joined,
        (blocks(num_tokens, _TOKENS), batch_size),
        *(joined, nearest, assignment, sizes, representatives, order, starts, num_tokens, num_groups),
        NEAREST=nearest is not None,
        TOKENS=_TOKENS,
        OTHERS=_OTHERS,
        num_warps=_WARPS,
    )
    return assignment, sizes, representatives, order, starts
