"""Which tokens form which group; merging the tokens of a group, and unfolding them again.

`merge_tokens` and `unfold_tokens` are each other's inverse as far as merging has one. Both are segment operations on
sorted indices (an embedding bag and an embedding): deterministic on every device, forward and backward, where a
floating-point scatter-add would depend on the order of atomics.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TokenGroups(NamedTuple):
    """Which tokens of a grid of N form which of M groups.

    Attributes:
        assignment: (batch_size, N) int64, each token's group in [0, M).
        sizes: (batch_size, M) int64, number of members; every group has at least one.
        representatives: (batch_size, M) int64, index of the token that stands for each group.
        order: (batch_size, N) int64, token indices sorted by group, in increasing order within a group.
    """

    assignment: Tensor
    sizes: Tensor
    representatives: Tensor
    order: Tensor


def group_tokens(assignment: Tensor, num_groups: int, representatives: Tensor | None = None) -> TokenGroups:
    """Describe an assignment, from `cluster_tokens` or any other method, as `TokenGroups`.

    Args:
        assignment: (batch_size, N) int64 in [0, num_groups), every group used at least once in every image.
        num_groups: M.
        representatives: (batch_size, M) int64; each group's first member when None.
    """
    ordered, order = assignment.sort(dim=1, stable=True)
    edges = torch.arange(num_groups + 1, device=assignment.device).expand(assignment.shape[0], -1).contiguous()
    starts = torch.searchsorted(ordered, edges)
    if representatives is None:
        representatives = order.gather(1, starts[:, :-1])
    return TokenGroups(assignment, starts.diff(dim=1), representatives, order)


def merge_tokens(tokens: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of each group's members: (batch_size, N, hidden_size) -> (batch_size, M, hidden_size), same dtype.

    Summed in float32 at least: the sum of a large group is beyond half precision long before its mean is. A group of
    one keeps its token's exact bits.
    """
    batch_size, num_tokens, hidden_size = tokens.shape
    first_token = torch.arange(batch_size, device=tokens.device)[:, None] * num_tokens
    first_member = groups.sizes.cumsum(1) - groups.sizes + first_token
    merged = F.embedding_bag(
        (groups.order + first_token).flatten(),
        _summable(tokens).reshape(-1, hidden_size),
        first_member.flatten(),
        mode="mean",
    )
    return merged.view(batch_size, -1, hidden_size).to(tokens.dtype)


def unfold_tokens(merged: Tensor, groups: TokenGroups) -> Tensor:
    """Copy each group's token to its members: (batch_size, M, hidden_size) -> (batch_size, N, hidden_size).

    The gradient of a group is the sum over its members, in float32 at least as in `merge_tokens`.
    """
    batch_size, num_groups, hidden_size = merged.shape
    first_group = torch.arange(batch_size, device=merged.device)[:, None] * num_groups
    # A model spread over several devices may end its merged layers on another one than it began them.
    places = groups.assignment.to(merged.device) + first_group
    if merged.requires_grad:
        return F.embedding(places, _summable(merged).reshape(-1, hidden_size)).to(merged.dtype)
    return F.embedding(places, merged.reshape(-1, hidden_size))


def _summable(tokens: Tensor) -> Tensor:
    """Tokens in a dtype that holds sums over many of them."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (batch_size, N, hidden_size) at the places (batch_size, K) int64 -> (batch_size, K, hidden_size)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
