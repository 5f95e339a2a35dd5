"""The forward of a plain ViT with timm's names as plain functions of its tensors.

It shares no code with the models of this package, so that a converted model can be checked against it. Formulas:
Dosovitskiy et al., ICLR 2021, section 3.1; LayerScale: Touvron et al., ICCV 2021; registers: Darcet et al., ICLR 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, pad, silu
from torch.nn.functional import linear as matrix_product

__all__ = ["Tensors", "ViTForward", "linear", "norm", "run_blocks", "under"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ViTForward:
    """The forward of one checkpoint, called with (tensors, pixel_values).

    Args:
        config: fields of `AiluRusConfig` found by the recipe.
        prefix: what precedes each name of the encoder.
        register_name: what the register tokens are called.
        classifiers: names of the classifiers whose logits are averaged; none returns all tokens.
    """

    config: Mapping[str, Any]
    prefix: str = ""
    register_name: str = "reg_token"
    classifiers: tuple[str, ...] = ()

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels), or tokens (batch_size, prefix + N, hidden_size) without classifiers."""
        own, eps = under(self.prefix, tensors), self.config["layer_norm_eps"]
        tokens, num_prefix = self._embed(own, pixel_values)
        tokens = run_blocks(own, tokens, self.config["num_attention_heads"], eps)
        if "norm.weight" in own:
            tokens = norm(own, "norm", tokens, eps)
        if not self.classifiers:
            return tokens
        pooled = tokens[:, num_prefix:].mean(1) if self.config.get("pooling") == "mean" else tokens[:, 0]
        if "fc_norm.weight" in own:
            pooled = norm(own, "fc_norm", pooled, eps)
        seen = [pooled, tokens[:, 1]]  # the second classifier, if any, looks at the distillation token
        logits = [linear(own, name, vector) for name, vector in zip(self.classifiers, seen, strict=False)]
        return torch.stack(logits).mean(0)

    def _embed(self, own: Tensors, pixel_values: Tensor) -> tuple[Tensor, int]:
        patch = own["patch_embed.proj.weight"].shape[-1]
        maps = conv2d(pixel_values, own["patch_embed.proj.weight"], own.get("patch_embed.proj.bias"), stride=patch)
        names = [name for name in ("cls_token", "dist_token", self.register_name) if name in own]
        first = [own[name].expand(len(maps), -1, -1) for name in names]
        patches = maps.flatten(2).transpose(1, 2)
        num_prefix = sum(part.shape[1] for part in first)
        table = own["pos_embed"]
        size = self.config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        grid = height // patch, width // patch
        rows = table.shape[1] - grid[0] * grid[1]
        positions = self._positions(table[:, rows:], grid, (maps.shape[-2], maps.shape[-1]))
        # tokens without a position of their own (registers, or all with no_embed_class) get zeros
        leading = pad(table[:, :rows], (0, 0, 0, num_prefix - rows))
        return torch.cat([*first, patches], dim=1) + torch.cat([leading, positions], dim=1), num_prefix

    def _positions(self, rows: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        same_count = self.config["position_resize_rule"] == "count" and rows.shape[1] == grid[0] * grid[1]
        if grid == trained or same_count:
            return rows
        table = rows.transpose(1, 2).unflatten(2, trained)
        mode, antialias = self.config["position_interpolation"], self.config.get("position_antialias", False)
        # a scale, not a size: where the table is sampled differs, which is what the originals computed with
        if offset := self.config.get("position_offset"):
            scale = tuple((new + offset) / old for new, old in zip(grid, trained, strict=True))
            table = interpolate(table, scale_factor=scale, mode=mode, antialias=antialias)
        else:
            table = interpolate(table, size=grid, mode=mode, antialias=antialias)
        return table.flatten(2).transpose(1, 2)


def run_blocks(own: Tensors, tokens: Tensor, num_heads: int, eps: float) -> Tensor:
    """The tokens behind all blocks of these tensors, in order; of `blocks.<chunk>.<block>` the last number counts."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("blocks.", own).items():
        parts = name.split(".")
        while parts[0].isdigit():
            number = int(parts.pop(0))
        blocks.setdefault(number, {})[".".join(parts)] = tensor
    for _, block in sorted(blocks.items()):
        attended = _attention(block, norm(block, "norm1", tokens, eps), num_heads, eps)
        tokens = tokens + attended * block.get("ls1.gamma", 1)
        tokens = tokens + _mlp(block, norm(block, "norm2", tokens, eps)) * block.get("ls2.gamma", 1)
    return tokens


def _attention(block: Tensors, tokens: Tensor, num_heads: int, eps: float) -> Tensor:
    qkv = linear(block, "attn.qkv", tokens).unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if "attn.q_norm.weight" in block:
        query, key = norm(block, "attn.q_norm", query, eps), norm(block, "attn.k_norm", key, eps)
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return linear(block, "attn.proj", (weights @ value).transpose(1, 2).flatten(2))


def _mlp(block: Tensors, tokens: Tensor) -> Tensor:
    if "mlp.w12.weight" in block:
        # SwiGLU: the first half of the rows is the gate
        gate, value = linear(block, "mlp.w12", tokens).chunk(2, dim=-1)
        return linear(block, "mlp.w3", silu(gate) * value)
    return linear(block, "mlp.fc2", gelu(linear(block, "mlp.fc1", tokens)))


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def linear(own: Tensors, name: str, hidden: Tensor) -> Tensor:
    """A linear layer, or a 1 x 1 convolution on tokens."""
    return matrix_product(hidden, own[f"{name}.weight"].flatten(1), own.get(f"{name}.bias"))


def norm(own: Tensors, name: str, hidden: Tensor, eps: float) -> Tensor:
    """A LayerNorm."""
    weight = own[f"{name}.weight"]
    return layer_norm(hidden, weight.shape, weight, own[f"{name}.bias"], eps=eps)
