"""Merging the tokens of a cluster, unfolding them again, and attention that weighs a merged token by its size.

`merge_tokens` and `unfold_tokens` are each other's inverse as far as merging has one. Both are segment operations on
sorted indices (an embedding bag and an embedding): deterministic on every device, forward and backward, where a
floating-point scatter-add would depend on the order of atomics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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

    The embedding bag sums half precision in float32. A group of one keeps its token's exact bits.
    """
    batch_size, num_tokens, hidden_size = tokens.shape
    first_token = torch.arange(batch_size, device=tokens.device)[:, None] * num_tokens
    first_member = groups.sizes.cumsum(1) - groups.sizes + first_token
    merged = F.embedding_bag(
        (groups.order + first_token).flatten(),
        tokens.reshape(-1, hidden_size),
        first_member.flatten(),
        mode="mean",
    )
    return merged.view(batch_size, -1, hidden_size)


def unfold_tokens(merged: Tensor, groups: TokenGroups) -> Tensor:
    """Copy each group's token to its members: (batch_size, M, hidden_size) -> (batch_size, N, hidden_size)."""
    batch_size, num_groups, hidden_size = merged.shape
    first_group = torch.arange(batch_size, device=merged.device)[:, None] * num_groups
    return F.embedding(groups.assignment + first_group, merged.reshape(-1, hidden_size))


def size_weighted_attention(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sizes: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in which a key counts as often as its token has members: `softmax_j(q_i k_j * scaling + log n_j)`.

    Runs on any function of transformers' attention interface. Eager and SDPA kernels take `log n_j` as an additive
    mask, flex attention as a position bias, flash kernels, which take neither, as extra channels of query and key.

    Args:
        attention: a function of transformers' attention interface.
        implementation: the name it is registered under, such as "sdpa"; says how it takes the sizes.
        module: the attention layer, handed to the function.
        query, key, value: (batch_size, num_heads, num_tokens, head_dim).
        log_sizes: (batch_size, num_tokens) float32, logarithm of the sizes; None for plain attention.
        scaling: factor of the dot products.
        dropout: dropout probability of the attention weights.

    Returns:
        The output (batch_size, num_tokens, num_heads, head_dim), and the weights (batch_size, num_heads, num_tokens,
        num_tokens) where the implementation has them, else None.
    """
    mask, head_dim = None, value.shape[-1]
    if log_sizes is not None and "flash" in implementation:
        query, key, value = append_size_channels(query, key, value, log_sizes, scaling)
    elif log_sizes is not None:
        bias = log_sizes[:, None, None, :].to(query.dtype)
        if "flex" in implementation:
            kwargs["position_bias"] = bias.expand(-1, query.shape[1], query.shape[2], -1)
        else:
            mask = bias
    output, weights = attention(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    return output[..., :head_dim], weights


def append_size_channels(
    query: Tensor, key: Tensor, value: Tensor, log_sizes: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry the size weights in the dot product, for kernels without additive masks.

    The query gets two channels of ones, the key `log n / scaling` split into a rounded part and its remainder, so that
    half precision loses little. All three are padded with zeros to a head size that is a multiple of 8.
    """
    num_heads, head_dim = key.shape[1], key.shape[-1]
    exact = log_sizes[:, None, :, None] / scaling
    high = exact.to(key.dtype)
    low = (exact - high).to(key.dtype)
    padding = -(head_dim + 2) % 8
    size_channels = F.pad(torch.cat([high, low], dim=-1), (0, padding)).expand(-1, num_heads, -1, -1)
    ones = F.pad(torch.ones_like(query[..., :2]), (0, padding))
    return (
        torch.cat([query, ones], dim=-1),
        torch.cat([key, size_channels], dim=-1),
        F.pad(value, (0, 2 + padding)),
    )
