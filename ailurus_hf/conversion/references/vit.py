"""The forward of a plain ViT with timm's names as plain functions of its tensors.

It shares no code with the models of this package, so that a converted model can be checked against it. Formulas:
Dosovitskiy et al., ICLR 2021, section 3.1; LayerScale: Touvron et al., ICCV 2021; registers: Darcet et al., ICLR 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, pad, silu

__all__ = ["ViTForward"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ViTForward:
    """The forward of one checkpoint, called with (tensors, pixel_values).

    Args:
        config: fields of `AiluRusConfig` found by the recipe.
        prefix: what precedes each name of the encoder.
        register_name: what the register tokens are called.
        antialias: whether positions are resized with a filter.
        offset: added to the target grid's sides to form the scale factor; 0 resizes to the exact size.
        classifiers: names of the classifiers whose logits are averaged; none returns all tokens.
    """

    config: Mapping[str, Any]
    prefix: str = ""
    register_name: str = "reg_token"
    antialias: bool = False
    offset: float = 0.0
    classifiers: tuple[str, ...] = ()

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels), or tokens (batch_size, prefix + N, hidden_size) without classifiers."""
        own = {name.removeprefix(self.prefix): tensor for name, tensor in tensors.items()}
        tokens, num_prefix = self._embed(own, pixel_values)
        for block in _blocks(own):
            tokens = self._block(block, tokens)
        if "norm.weight" in own:
            tokens = self._norm(own, "norm", tokens)
        if not self.classifiers:
            return tokens
        pooled = tokens[:, num_prefix:].mean(1) if self.config.get("pooling") == "mean" else tokens[:, 0]
        if "fc_norm.weight" in own:
            pooled = self._norm(own, "fc_norm", pooled)
        seen = [pooled, tokens[:, 1]]  # the second classifier, if any, looks at the distillation token
        logits = [_linear(own, name, vector) for name, vector in zip(self.classifiers, seen, strict=False)]
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
        if grid == trained:
            return rows
        table = rows.transpose(1, 2).unflatten(2, trained)
        # a scale, not a size: where the table is sampled differs, which is what the originals computed with
        if self.offset:
            scale = tuple((new + self.offset) / old for new, old in zip(grid, trained, strict=True))
            table = interpolate(table, scale_factor=scale, mode="bicubic", antialias=self.antialias)
        else:
            table = interpolate(table, size=grid, mode="bicubic", antialias=self.antialias)
        return table.flatten(2).transpose(1, 2)

    def _block(self, block: Tensors, tokens: Tensor) -> Tensor:
        attended = self._attention(block, self._norm(block, "norm1", tokens))
        tokens = tokens + attended * block.get("ls1.gamma", 1)
        normed = self._norm(block, "norm2", tokens)
        if "mlp.w12.weight" in block:
            # SwiGLU: the first half of the rows is the gate
            gate, value = _linear(block, "mlp.w12", normed).chunk(2, dim=-1)
            return tokens + _linear(block, "mlp.w3", silu(gate) * value) * block.get("ls2.gamma", 1)
        return tokens + _linear(block, "mlp.fc2", gelu(_linear(block, "mlp.fc1", normed))) * block.get("ls2.gamma", 1)

    def _attention(self, block: Tensors, tokens: Tensor) -> Tensor:
        qkv = _linear(block, "attn.qkv", tokens).unflatten(-1, (3, self.config["num_attention_heads"], -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if "attn.q_norm.weight" in block:
            query, key = self._norm(block, "attn.q_norm", query), self._norm(block, "attn.k_norm", key)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return _linear(block, "attn.proj", (weights @ value).transpose(1, 2).flatten(2))

    def _norm(self, own: Tensors, name: str, hidden: Tensor) -> Tensor:
        weight = own[f"{name}.weight"]
        return layer_norm(hidden, weight.shape, weight, own[f"{name}.bias"], eps=self.config["layer_norm_eps"])


def _blocks(own: Tensors) -> list[dict[str, Tensor]]:
    """The tensors of each block, in order; of `blocks.<chunk>.<block>` the last number counts."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in own.items():
        first, *rest = name.split(".")
        if first != "blocks":
            continue
        while rest[0].isdigit():
            number = int(rest.pop(0))
        blocks.setdefault(number, {})[".".join(rest)] = tensor
    return [blocks[number] for number in sorted(blocks)]


def _linear(own: Tensors, name: str, hidden: Tensor) -> Tensor:
    return linear(hidden, own[f"{name}.weight"], own.get(f"{name}.bias"))
