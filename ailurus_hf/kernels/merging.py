"""Means of the tokens of each group, and what made each token differ; the plain reference is
`modeling.token_groups.merge_tokens`."""

from typing import Any

import torch
from torch import Tensor

from ..utils.extras import needs_extra
from .launching import blocks, launch, rows, sum_dtype, tile

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

_GROUPS = tile(1)  # of a program: they differ in size
_FEATURES = 256  # of a program: 8 for each of 32 threads
_WARPS = 1


@triton.jit
def _merge_kernel(
    tokens,
    order,
    starts,
    sizes,
    merged,
    residual,
    log_sizes,
    num_tokens,
    num_groups,
    hidden_size,
    batch_stride,
    row_stride,
    MEAN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOG_SIZES: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """One program: some features of some groups, whose members come one after the other."""
    part, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    feature = (part * FEATURES + tl.arange(0, FEATURES))[None]
    exists, inside = group < num_groups, feature < hidden_size
    size = tl.load(sizes + image * num_groups + group, mask=exists, other=0)
    members = order + image * num_tokens + tl.load(starts + image * num_groups + group, mask=exists, other=0)
    row, most = tokens + image * batch_stride + feature, tl.max(size).to(tl.int32)
    total = tl.zeros([GROUPS, FEATURES], DTYPE)
    for place in tl.range(0, most, loop_unroll_factor=4):  # so that four loads are under way
        member = tl.load(members + place, mask=place < size, other=0)[:, None]
        total += tl.load(row + member * row_stride, mask=(place < size)[:, None] & inside, other=0).to(DTYPE)
    if MEAN:
        count = tl.broadcast_to(tl.maximum(size, 1)[:, None], total.shape).to(DTYPE)
        total = total / count if tl.float64 == DTYPE else tl.div_rn(total, count)
    mean = total.to(merged.dtype.element_ty)
    written = merged + (image * num_groups + group[:, None]) * hidden_size + feature
    tl.store(written, mean, mask=exists[:, None] & inside)
    if RESIDUAL:
        for place in tl.range(0, most, loop_unroll_factor=4):
            member, is_member = tl.load(members + place, mask=place < size, other=0)[:, None], (place < size)[:, None]
            token = tl.load(row + member * row_stride, mask=is_member & inside, other=0).to(DTYPE)
            rest = (token - mean.to(DTYPE)).to(residual.dtype.element_ty)
            written = residual + (image * num_tokens + member) * hidden_size + feature
            tl.store(written, rest, mask=is_member & inside)
    if LOG_SIZES:  # noqa: SIM102 (known when compiling, the other is not)
        if part == 0:
            tl.store(log_sizes + image * num_groups + group, tl.log(tl.maximum(size, 1).to(tl.float32)), mask=exists)


def _launch_merge(
    tokens: Tensor,
    order: Tensor,
    starts: Tensor,
    sizes: Tensor,
    residual: Tensor | None,
    log_sizes: Tensor | None,
    mean: bool,
) -> Tensor:
    tokens = rows(tokens)
    (batch_size, num_tokens, hidden_size), num_groups = tokens.shape, sizes.shape[1]
    merged = tokens.new_empty(batch_size, num_groups, hidden_size)
    launch(
        _merge_kernel,
        tokens,
        (blocks(num_groups, _GROUPS), blocks(hidden_size, _FEATURES), batch_size),
        *(tokens, order, starts, sizes, merged, residual, log_sizes),
        *(num_tokens, num_groups, hidden_size, tokens.stride(0), tokens.stride(1)),
        MEAN=mean,
        RESIDUAL=residual is not None,
        LOG_SIZES=log_sizes is not None,
        DTYPE=sum_dtype(tokens.dtype),
        GROUPS=_GROUPS,
        FEATURES=_FEATURES,
        num_warps=_WARPS,
    )
    return merged


def merge(
    tokens: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, with_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each group's mean, summed in float32 at least in the order of the tokens; the residual of each token, or nothing;
    the logarithm of each group's size. One launch.

    Args:
        tokens: (batch_size, N, hidden_size), any float dtype.
        order, starts, sizes, assignment: of `TokenGroups`.
        with_residual: whether to compute what made each token differ from its group's mean.

    Returns:
        merged (batch_size, M, hidden_size) and residual (batch_size, N, hidden_size), of the tokens' dtype, the latter
        of no element where not asked for; log_sizes (batch_size, M) float32.
    """
    residual = tokens.new_empty(tokens.shape) if with_residual else None
    log_sizes = sizes.new_empty(sizes.shape, dtype=torch.float32)
    merged = _launch_merge(tokens, order, starts, sizes, residual, log_sizes, mean=True)
    return merged, tokens.new_empty(0) if residual is None else residual, log_sizes


def reduce_members(
    tokens: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, mean: bool
) -> Tensor:
    """Sum, or mean, of each group's tokens: (batch_size, N, hidden_size) -> (batch_size, M, hidden_size). One launch.
    The transpose of `unfolding.spread`."""
    return _launch_merge(tokens, order, starts, sizes, None, None, mean)


merge_op = torch.library.custom_op("ailurus::merge", merge, mutates_args=())
reduce_members_op = torch.library.custom_op("ailurus::reduce_members", reduce_members, mutates_args=())


@merge_op.register_fake
def _(
    tokens: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, with_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    merged = tokens.new_empty(tokens.shape[0], sizes.shape[1], tokens.shape[2])
    residual = tokens.new_empty(tokens.shape if with_residual else 0)
    return merged, residual, sizes.new_empty(sizes.shape, dtype=torch.float32)


@reduce_members_op.register_fake
def _(tokens: Tensor, order: Tensor, starts: Tensor, sizes: Tensor, assignment: Tensor, mean: bool) -> Tensor:
    return tokens.new_empty(tokens.shape[0], sizes.shape[1], tokens.shape[2])


def _keep_for_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.with_residual = inputs[5]
    ctx.mark_non_differentiable(output[2])


def _merge_backward(ctx: Any, merged: Tensor, residual: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    groups, spread = ctx.saved_tensors, torch.ops.ailurus.spread  # the transpose, of `unfolding`
    if ctx.with_residual:
        of_members = spread(merged - reduce_members_op(residual, *groups, False), *groups, True)
        return residual + of_members, None, None, None, None, None
    return spread(merged, *groups, True), None, None, None, None, None


def _keep_for_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.mean = inputs[5]


def _reduce_backward(ctx: Any, merged: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ailurus.spread(merged, *ctx.saved_tensors, ctx.mean), None, None, None, None, None


merge_op.register_autograd(_merge_backward, setup_context=_keep_for_merge)
reduce_members_op.register_autograd(_reduce_backward, setup_context=_keep_for_reduce)
