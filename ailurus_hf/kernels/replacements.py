"""What runs in the place of which function of `modeling/`, and where it falls back on that function."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from ..modeling.grouping_region_merging import project
from ..modeling.reduction import Grid, ReductionContext, features
from ..modeling.settings import AdaptiveResolutionMixin
from ..modeling.token_groups import REPLACEMENTS, TokenGroups
from .density_peaks import MOST_NEIGHBORS, density_peaks_op
from .launching import can_group, can_run, members
from .merging import merge_op, reduce_members_op
from .region_merging import region_merging_op
from .unfolding import restore_op, spread_op

Plain = Callable[..., Any]


@torch.no_grad()
def _density_peaks(
    plain: Plain,
    tokens: Tensor,
    grid: Grid,
    num_groups: int,
    settings: AdaptiveResolutionMixin,
    context: ReductionContext,
) -> Any:
    points = features(tokens, settings, context)
    if not can_group(points, math.prod(grid), num_groups) or settings.neighborhood_size > MOST_NEIGHBORS:
        return plain(tokens, grid, num_groups, settings, context)
    constants = settings.num_neighbors, settings.neighborhood_size, settings.spatial_alpha
    return TokenGroups(*density_peaks_op(points, list(grid), num_groups, *constants))


@torch.no_grad()
def _region_merging(
    plain: Plain,
    tokens: Tensor,
    grid: Grid,
    num_groups: int,
    settings: AdaptiveResolutionMixin,
    context: ReductionContext,
) -> Any:
    hinted = context.protect is not None or context.reduction is not None
    if hinted or not can_group(tokens, math.prod(grid), num_groups):
        return plain(tokens, grid, num_groups, settings, context)
    points = features(tokens, settings, context)
    with maybe_autocast(tokens.device.type, enabled=False):
        projected = project(points.float())
    return TokenGroups(*region_merging_op(projected, list(grid), num_groups))


def _merge_groups(plain: Plain, tokens: Tensor, groups: TokenGroups, unfold: str) -> Any:
    if not can_run(tokens, groups.order):
        return plain(tokens, groups, unfold)
    merged, residual, log_sizes = merge_op(tokens, *members(groups), unfold == "residual")
    return merged, residual if unfold == "residual" else None, log_sizes


def _merge_tokens(plain: Plain, tokens: Tensor, groups: TokenGroups) -> Any:
    if not can_run(tokens, groups.order):
        return plain(tokens, groups)
    return reduce_members_op(tokens, *members(groups), True)


def _unfold_tokens(plain: Plain, merged: Tensor, groups: TokenGroups) -> Any:
    if not can_run(merged, groups.order):
        return plain(merged, groups)
    return spread_op(merged, *members(groups), False)


def _restore_groups(plain: Plain, tokens: Tensor, groups: TokenGroups, residual: Tensor | None) -> Any:
    if residual is None or residual.dtype != tokens.dtype or not can_run(tokens, residual, groups.order):
        return plain(tokens, groups, residual)
    return restore_op(tokens, residual, *members(groups))


_REPLACEMENTS: dict[str, Plain] = {
    "_density_peaks": _density_peaks,
    "_region_merging": _region_merging,
    "_merge_groups": _merge_groups,
    "merge_tokens": _merge_tokens,
    "unfold_tokens": _unfold_tokens,
    "restore_groups": _restore_groups,
}


def enable() -> None:
    """Use the kernels from now on, in all models of this package; not in the code that a checkpoint brings."""
    REPLACEMENTS.update(_REPLACEMENTS)


def disable() -> None:
    """Use the plain operations again."""
    REPLACEMENTS.clear()
