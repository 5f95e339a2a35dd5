"""The block of LookupViT: attention that hands on what it found, and the reuse of it in the other direction."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_lookupvit import LookupViTConfig
from .layers_ailurus import AiluRusAttention, AiluRusDropPath, AiluRusMLP, LayerShape


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """(batch_size, T, hidden_size) -> (batch_size, num_heads, T, head_dim); shares memory."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attention_weights(logits: Tensor, dim: int, dropout: float, training: bool) -> Tensor:
    """Softmax along one axis, in float32 where the dtype is of half precision, with dropout while training."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.softmax(dim, dtype=precise).to(logits.dtype)
    return F.dropout(weights, p=dropout, training=training)


class LookupViTGather(nn.Module):
    """Attention of the compressed tokens to the lookup tokens: S = (W_q LN(c)) (W_k LN(l))^T / sqrt(head_dim) for each
    head, and W_o softmax_N(S) W_v LN(l)."""

    def __init__(self, config: LookupViTConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.head_dim = size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.compressed_norm = nn.LayerNorm(size, eps=eps)
        self.lookup_norm = nn.LayerNorm(size, eps=eps)
        self.q_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(size, size)

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compressed tokens (batch_size, M, hidden_size) and lookup tokens (batch_size, N, hidden_size) -> what the
        former gather, of their shape, and logits and weights (batch_size, num_heads, M, N)."""
        lookup = self.lookup_norm(lookup)
        query = split_heads(self.q_proj(self.compressed_norm(compressed)), self.head_dim)
        key, value = (split_heads(projection(lookup), self.head_dim) for projection in (self.k_proj, self.v_proj))
        # The query is scaled, not the logits: they are the larger of the two.
        logits = (query * self.head_dim**-0.5) @ key.transpose(-1, -2)
        weights = attention_weights(logits, -1, self.attention_dropout, self.training)
        return self.o_proj((weights @ value).transpose(1, 2).flatten(2)), logits, weights


class LookupViTInfuse(nn.Module):
    """What the lookup tokens take from the compressed ones, by the attention of `LookupViTGather` the other way round:
    W_o A^T W_v LN(c), where A is `N / M softmax_N(S)`, whose rows for a lookup token sum to 1 on average, or, with
    `attention_reuse="logits"`, `softmax_M(S)`."""

    def __init__(self, config: LookupViTConfig):
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.reuses_weights = config.attention_reuse == "weights"
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.v_proj = nn.Linear(size, size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(size, size)

    def forward(self, compressed: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
        """Compressed tokens (batch_size, M, hidden_size), logits and weights (batch_size, num_heads, M, N) ->
        (batch_size, N, hidden_size)."""
        value = split_heads(self.v_proj(self.norm(compressed)), self.head_dim)
        if self.reuses_weights:
            value = value * (logits.shape[-1] / logits.shape[-2])  # smaller than the weights
        else:
            weights = attention_weights(logits, -2, self.attention_dropout, self.training)
        return self.o_proj((weights.transpose(-1, -2) @ value).transpose(1, 2).flatten(2))


class LookupViTBlock(GradientCheckpointingLayer):
    """One block (arXiv 2407.12753): the compressed tokens gather from the lookup tokens, are refined as in a plain
    vision transformer, and infuse the lookup tokens, which have a light MLP of their own."""

    def __init__(self, config: LookupViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        shape = LayerShape(
            hidden_size=size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=eps,
            dropout=config.hidden_dropout_prob,
            qkv_bias=config.qkv_bias,
        )
        self.gather = LookupViTGather(config)
        self.layernorm_before = nn.LayerNorm(size, eps=eps)
        self.attention = AiluRusAttention(config, shape)
        self.layernorm_after = nn.LayerNorm(size, eps=eps)
        self.mlp = AiluRusMLP(config, shape)
        self.infuse = LookupViTInfuse(config)
        self.lookup_norm = nn.LayerNorm(size, eps=eps)
        self.lookup_mlp = AiluRusMLP(config, shape._replace(intermediate_size=config.lookup_intermediate_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = AiluRusDropPath(drop_path_rate)

    def forward(
        self, compressed: Tensor, lookup: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compressed tokens (batch_size, M, hidden_size) and lookup tokens (batch_size, N, hidden_size) -> both, and
        the weights with which the former gather, (batch_size, num_heads, M, N), if asked for."""
        gathered, logits, weights = self.gather(compressed, lookup)
        compressed = compressed + self._branch(gathered)
        compressed = compressed + self._branch(self.attention(self.layernorm_before(compressed))[0])
        compressed = compressed + self._branch(self.mlp(self.layernorm_after(compressed)))
        lookup = lookup + self._branch(self.infuse(compressed, logits, weights))
        lookup = lookup + self._branch(self.lookup_mlp(self.lookup_norm(lookup)))
        return compressed, lookup, weights if output_attentions else None

    def _branch(self, states: Tensor) -> Any:
        return self.drop_path(self.dropout(states))
