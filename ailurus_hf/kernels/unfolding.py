"""Each group's token for all its members, with what made each of them differ; the plain reference is
`modeling.reduction.restore_groups`."""

from typing import Any

import torch
from torch import Tensor

from ..utils.extras import needs_extra
from .launching import blocks, launch, power_of_2, rows, sum_dtype, tile
from .merging import reduce_members_op

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

_FEATURES = 1024  # most of a program
_ELEMENTS = tile(4096)  # of a program, over its tokens: 32 for each of 128 threads
_WARPS = 4


@triton.jit
def _unfold_kernel(
    merged,
    assignment,
    sizes,
    residual,
    unfolded,
    num_tokens,
    num_groups,
    hidden_size,
    batch_stride,
    row_stride,
    residual_batch_stride,
    residual_row_stride,
    MEAN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: some features of some tokens."""
    image = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES))[None]
    exists = token < num_tokens
    inside = exists[:, None] & (feature < hidden_size)
    group = tl.load(assignment + image * num_tokens + token, mask=exists, other=0)
    found = tl.load(merged + image * batch_stride + group[:, None] * row_stride + feature, mask=inside)
    if MEAN:
        size = tl.load(sizes + image * num_groups + group).to(DTYPE)[:, None]
        found = found.to(DTYPE)
        found = found / size if tl.float64 == DTYPE else tl.div_rn(found, tl.broadcast_to(size, found.shape))
    if RESIDUAL:
        place = image * residual_batch_stride + token[:, None] * residual_row_stride + feature
        found = found.to(DTYPE) + tl.load(residual + place, mask=inside).to(DTYPE)
    place = (image * num_tokens + token[:, None]) * hidden_size + feature
    tl.store(unfolded + place, found.to(unfolded.dtype.element_ty), mask=inside)


def _launch_unfold(merged: Tensor, residual: Tensor | None, sizes: Tensor, assignment: Tensor, mean: bool) -> Tensor:
    merged, num_tokens = rows(merged), assignment.shape[1]
    batch_size, num_groups, hidden_size = merged.shape
    residual = None if residual is None else rows(residual)
    unfolded = merged.new_empty(batch_size, num_tokens, hidden_size)
    features = min(power_of_2(hidden_size), _FEATURES)
    launch(
        _unfold_kernel,
        merged,
        (blocks(num_tokens, _ELEMENTS // features), blocks(hidden_size, features), batch_size),
        *(merged, assignment, sizes, residual, unfolded, num_tokens, num_groups, hidden_size),
        *(merged.stride(0), merged.stride(1)),
        *((0, 0) if residual is None else (residual.stride(0), residual.stride(1))),
        MEAN=mean,
        RESIDUAL=residual is not None,
        DTYPE=sum_dtype(merged.dtype),
        TOKENS=_ELEMENTS // features,
        FEATURES=features,
        num_warps=_WARPS,
    )
    return unfolded


def restore(
    merged: Tensor, residual: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor
) -> Tensor:
    """Each group's token plus each member's residual. One launch.

    Args:
        merged: (batch_size, M, hidden_size), any float dtype.
        residual: (batch_size, N, hidden_size), same dtype.
        order, starts, sizes, assignment: of `TokenGroups`.

    Returns:
        (batch_size, N, hidden_size), same dtype.
    """
    return _launch_unfold(merged, residual, sizes, assignment, mean=False)


def spread(merged: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, mean: bool) -> Tensor:
    """Each group's token, or its share for each of the members: (batch_size, M, hidden_size) -> (batch_size, N,
    hidden_size). One launch. The transpose of `merging.reduce_members`."""
    return _launch_unfold(merged, None, sizes, assignment, mean)


restore_op = torch.library.custom_op("ailurus::restore", restore, mutates_args=())
spread_op = torch.library.custom_op("ailurus::spread", spread, mutates_args=())


@restore_op.register_fake
def _(merged: Tensor, residual: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor) -> Tensor:
    return merged.new_empty(merged.shape[0], assignment.shape[1], merged.shape[2])


@spread_op.register_fake
def _(merged: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, mean: bool) -> Tensor:
    return merged.new_empty(merged.shape[0], assignment.shape[1], merged.shape[2])


def _keep_for_restore(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _restore_backward(ctx: Any, unfolded: Tensor) -> tuple[Tensor | None, ...]:
    return reduce_members_op(unfolded, *ctx.saved_tensors, False), unfolded, None, None, None, None


def _keep_for_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.mean = inputs[5]


def _spread_backward(ctx: Any, unfolded: Tensor) -> tuple[Tensor | None, ...]:
    return reduce_members_op(unfolded, *ctx.saved_tensors, ctx.mean), None, None, None, None, None


restore_op.register_autograd(_restore_backward, setup_context=_keep_for_restore)
spread_op.register_autograd(_spread_backward, setup_context=_keep_for_spread)
