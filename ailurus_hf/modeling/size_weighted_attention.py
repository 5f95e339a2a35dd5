"""Attention in which a merged token counts as often as it has members, on every attention kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
