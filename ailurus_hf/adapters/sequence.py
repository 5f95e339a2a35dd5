"""Merging the patch tokens inside a sequence that other tokens precede or follow, and unfolding it again."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling.configuration_ailurus import AdaptiveResolutionMixin
from ..modeling.grouping_density_peaks import cluster_tokens, resolve_num_clusters
from ..modeling.token_groups import TokenGroups, group_tokens, merge_tokens, unfold_tokens


class MergedSequence(NamedTuple):
    """What a sequence needs to come back from merging.

    Attributes:
        groups: the clusters of patch tokens.
        num_prefix: number of tokens in front of the patch tokens.
        num_suffix: number of tokens behind them.
        residual: (batch_size, N, hidden_size), each patch token minus its cluster's mean; None for `unfold="copy"`.
    """

    groups: TokenGroups
    num_prefix: int
    num_suffix: int
    residual: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Length of the merged sequence, prefix and suffix included."""
        return self.num_prefix + self.groups.sizes.shape[1] + self.num_suffix

    def log_sizes(self) -> Tensor:
        """(batch_size, num_tokens) float32, logarithm of the sizes; 0 for prefix and suffix tokens."""
        return F.pad(self.groups.sizes.float().log(), (self.num_prefix, self.num_suffix))

    def kept_positions(self) -> Tensor:
        """(batch_size, num_tokens) int64, place in the full sequence of the token that stands for each merged one."""
        groups = self.groups
        batch_size, device = groups.sizes.shape[0], groups.sizes.device
        end = self.num_prefix + groups.assignment.shape[1]
        prefix = torch.arange(self.num_prefix, device=device).expand(batch_size, -1)
        suffix = torch.arange(end, end + self.num_suffix, device=device).expand(batch_size, -1)
        return torch.cat([prefix, groups.representatives + self.num_prefix, suffix], dim=1)


def choose_groups(tokens: Tensor, grid: tuple[int, ...], settings: AdaptiveResolutionMixin) -> TokenGroups | None:
    """Cluster patch tokens (batch_size, N, hidden_size) on their grid; None where the settings merge nothing."""
    num_tokens = math.prod(grid)
    num_clusters = resolve_num_clusters(num_tokens, settings.keep_ratio, settings.num_clusters)
    if num_clusters == num_tokens:
        return None
    assignment, representatives = cluster_tokens(
        tokens,
        grid,
        num_clusters,
        num_neighbors=settings.num_neighbors,
        neighborhood_size=settings.neighborhood_size,
        spatial_alpha=settings.spatial_alpha,
    )
    return group_tokens(assignment, num_clusters, representatives)


def merge_sequence(
    sequence: Tensor,
    grid: tuple[int, ...],
    num_suffix: int,
    settings: AdaptiveResolutionMixin,
    order: Tensor | None = None,
    choose: Callable[..., TokenGroups | None] | None = None,
) -> tuple[Tensor, MergedSequence | None]:
    """Merge the patch tokens of a sequence; tokens in front of them and behind pass untouched.

    Args:
        sequence: (batch_size, prefix + N + num_suffix, hidden_size); the prefix is what is left.
        grid: sizes of the grid's axes in tokens; their product is N.
        num_suffix: number of tokens behind the patch tokens.
        settings: how to cluster.
        order: (batch_size, N) int64, for each position of the grid the place of its token among the patch tokens; None
            where they stand in the grid's order.
        choose: another way to choose the groups, with the arguments of `choose_groups`.

    Returns:
        The merged sequence, (batch_size, prefix + M + num_suffix, hidden_size), and what brings it back; the sequence
        itself and None where the settings merge nothing.

    Raises:
        ValueError: the sequence is shorter than the grid.
    """
    num_prefix = sequence.shape[1] - math.prod(grid) - num_suffix
    if num_prefix < 0:
        raise ValueError(
            f"the sequence must hold a token for every patch of the grid {grid} and {num_suffix} behind them, got "
            f"{sequence.shape[1]} tokens: a subset of the patches, or several images packed in one sequence, has no "
            "grid to cluster on; run the model on whole images, or call remove_ailurus(model)"
        )
    prefix, tokens, suffix = sequence.split([num_prefix, math.prod(grid), num_suffix], dim=1)
    choose = choose or choose_groups
    if order is None:
        groups = choose(tokens, grid, settings)
    else:
        groups = choose(tokens.gather(1, order[..., None].expand_as(tokens)), grid, settings)
        groups = None if groups is None else _in_sequence_order(groups, order)
    if groups is None:
        return sequence, None
    merged = merge_tokens(tokens, groups)
    residual = tokens - unfold_tokens(merged, groups) if settings.unfold == "residual" else None
    return torch.cat([prefix, merged, suffix], dim=1), MergedSequence(groups, num_prefix, num_suffix, residual)


def _in_sequence_order(groups: TokenGroups, order: Tensor) -> TokenGroups:
    """Groups of the grid's positions as groups of the tokens that `order` puts there."""
    assignment = groups.assignment.gather(1, order.argsort(dim=1))
    return group_tokens(assignment, groups.sizes.shape[1], order.gather(1, groups.representatives))


def unfold_sequence(sequence: Tensor, merged: MergedSequence) -> Tensor:
    """(batch_size, prefix + M + suffix, hidden_size) -> (batch_size, prefix + N + suffix, hidden_size).

    Raises:
        RuntimeError: the sequence does not have the number of tokens that merging left: something between the layers
            added or took tokens.
    """
    if sequence.shape[1] != merged.num_tokens:
        raise RuntimeError(
            f"expected {merged.num_tokens} merged tokens to unfold, got {sequence.shape[1]}: this model adds or "
            "removes tokens between its layers, which its row in the table of families does not say"
        )
    groups = TokenGroups(*(index.to(sequence.device) for index in merged.groups))
    sizes = [merged.num_prefix, groups.sizes.shape[1], merged.num_suffix]
    prefix, tokens, suffix = sequence.split(sizes, dim=1)
    tokens = unfold_tokens(tokens, groups)
    if merged.residual is not None:
        tokens = tokens + merged.residual.to(tokens.device)
    return torch.cat([prefix, tokens, suffix], dim=1)
