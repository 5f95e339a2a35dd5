"""Transformer layers of the AiluRus models: size-weighted attention, MLP, LayerScale, stochastic depth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from .configuration_ailurus import AiluRusConfig
from .settings import names_of, refuse_unknown
from .size_weighted_attention import size_weighted_attention


class LayerShape(NamedTuple):
    """What the layers of the encoder and of the mask transformer have in common, and differ in."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    dropout: float
    drop_path_rate: float = 0.0
    qkv_bias: bool = True
    layerscale_value: float | None = None
    use_swiglu_ffn: bool = False
    use_qk_norm: bool = False


_KEYWORDS = tuple(TransformersKwargs.__annotations__)


def settings_of_call(model: Any, keywords: Mapping[str, Any]) -> Any:
    """The settings of a forward with these keyword arguments; any setting may be among them, for this call.

    What transformers passes to any model is ignored, and so is what is None, since wrappers such as PEFT's pass such.

    Raises:
        TypeError: a keyword is no setting and unknown to transformers: a misspelt one would do nothing.
        ValueError: a setting is out of range or of the wrong type.
    """
    given = [name for name, value in keywords.items() if value is not None]
    refuse_unknown(type(model).__name__, given, (*names_of(model.config), *_KEYWORDS))
    return model.config.current(keywords)


def wanted_states(config: Any, requested: bool | int | list[int] | None, count: int) -> set[int]:
    """Which of `count` hidden states to return, from a flag, an index or a list of indices (negative from the end)."""
    if requested is None:
        requested = config.output_hidden_states
    if isinstance(requested, bool):
        return set(range(count)) if requested else set()
    indices = [requested] if isinstance(requested, int) else requested
    return {index % count for index in indices if -count <= index < count}


def wants_attentions(config: Any, requested: bool | None) -> bool:
    """Whether to return attention weights.

    Raises:
        ValueError: they are wanted, and the attention implementation has none.
    """
    requested = config.output_attentions if requested is None else requested
    if requested and config._attn_implementation != "eager":
        raise ValueError(
            "output_attentions=True needs attn_implementation='eager', got "
            f"{config._attn_implementation!r}; call model.set_attn_implementation('eager') first"
        )
    return bool(requested)


def check_pixels(pixel_values: Tensor, num_channels: int) -> None:
    """Raise ValueError for pixels that are not (batch_size, num_channels, height, width)."""
    if pixel_values.ndim != 4:
        raise ValueError(
            "pixel_values must be (batch_size, num_channels, height, width), got shape "
            f"{tuple(pixel_values.shape)}; add the batch dimension with pixel_values[None]"
        )
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values must have num_channels={num_channels} channels, got {pixel_values.shape[1]} "
            f"in shape {tuple(pixel_values.shape)}"
        )


def check_patches(pixel_values: Tensor, patch_size: int) -> None:
    """Raise ValueError for images, or frames, smaller than a patch."""
    if min(pixel_values.shape[-2:]) < patch_size:
        raise ValueError(
            f"pixel_values must be at least one patch of {patch_size} x {patch_size} pixels, got height "
            f"and width {tuple(pixel_values.shape[-2:])}"
        )


@dataclass
class GroupingOutput:
    """What every output has beside transformers' own fields; see the encoders' outputs."""

    assignment: Any = None
    group_sizes: Any = None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`: the one that returns its weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(weights, p=dropout, training=module.training) @ value
    return output.transpose(1, 2), weights


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch_size, N, channels) as a map (batch_size, channels, rows, columns); shares memory.

    The rows are unfolded before the axes are swapped. In the other order a batch of one gets strides that PyTorch does
    not recognise as channels-last, and convolutions on the CPU fall back to paths up to 20 times slower.
    """
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Map (batch_size, channels, rows, columns) as tokens (batch_size, N, channels); shares memory."""
    return feature_map.flatten(2).transpose(1, 2)


class AiluRusAttention(nn.Module):
    """Multi-head self-attention, size-weighted when sizes are given."""

    is_causal = False

    def __init__(self, config: Any, shape: LayerShape):
        super().__init__()
        self.config = config
        self.head_dim = shape.hidden_size // shape.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim, eps=shape.layer_norm_eps) if shape.use_qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, hidden_states: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        def split_heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        implementation = self.config._attn_implementation
        output, weights = size_weighted_attention(
            ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward),
            implementation,
            self,
            self.q_norm(split_heads(self.q_proj(hidden_states))),
            self.k_norm(split_heads(self.k_proj(hidden_states))),
            split_heads(self.v_proj(hidden_states)),
            log_sizes,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(output.flatten(2)), weights

    def keys(self, hidden_states: Tensor) -> Tensor:
        """Keys of normed tokens, (batch_size, T, hidden_size) -> same, heads one after the other."""
        return self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).flatten(2)

    def class_attention(self, hidden_states: Tensor) -> Tensor:
        """Attention weights of the first token, mean over the heads: normed tokens (batch_size, T, hidden_size) ->
        (batch_size, T)."""
        query = self.q_norm(self.q_proj(hidden_states[:, :1]).unflatten(-1, (-1, self.head_dim)))
        keys = self.keys(hidden_states).unflatten(-1, (-1, self.head_dim))
        return (torch.einsum("bqhd,bkhd->bhk", query, keys) * self.scaling).softmax(-1).mean(1)


class AiluRusMLP(nn.Module):
    def __init__(self, config: Any, shape: LayerShape):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class AiluRusSwiGLUFFN(nn.Module):
    """Gated MLP (arXiv 2002.05202, section 2): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: AiluRusConfig, shape: LayerShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class AiluRusLayerScale(nn.Module):
    def __init__(self, hidden_size: int, initial_value: float):
        super().__init__()
        self.initial_value = initial_value
        self.lambda1 = nn.Parameter(torch.full((hidden_size,), initial_value))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class AiluRusDropPath(nn.Module):
    """Stochastic depth: drops the whole branch for some images of the batch while training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * keep / (1 - self.rate)


class AiluRusLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer: attention, then MLP."""

    def __init__(self, config: AiluRusConfig, shape: LayerShape):
        super().__init__()
        size, scale = shape.hidden_size, shape.layerscale_value
        self.layernorm_before = nn.LayerNorm(size, eps=shape.layer_norm_eps)
        self.attention = AiluRusAttention(config, shape)
        self.layer_scale1 = nn.Identity() if scale is None else AiluRusLayerScale(size, scale)
        self.layernorm_after = nn.LayerNorm(size, eps=shape.layer_norm_eps)
        self.mlp = (AiluRusSwiGLUFFN if shape.use_swiglu_ffn else AiluRusMLP)(config, shape)
        self.layer_scale2 = nn.Identity() if scale is None else AiluRusLayerScale(size, scale)
        self.dropout = nn.Dropout(shape.dropout)
        self.drop_path = AiluRusDropPath(shape.drop_path_rate)

    def forward(self, hidden_states: Tensor, log_sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (batch_size, T, hidden_size), and log sizes (batch_size, T) if they are merged, -> tokens, weights."""
        attended, weights = self.attention(self.layernorm_before(hidden_states), log_sizes)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(transformed))), weights
