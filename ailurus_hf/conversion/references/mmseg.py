"""The forward of mmsegmentation's Segmenter and SETR models as plain functions of a checkpoint's tensors.

It shares no code with the models of this package, so that a converted model can be checked against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, gelu, interpolate, layer_norm, linear, normalize, pad, relu

__all__ = ["MmsegForward"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class MmsegForward:
    """The forward of one checkpoint, called with (tensors, pixel_values); `config` as found by the recipe."""

    config: Mapping[str, Any]

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels, height, width)."""
        size, patch = pixel_values.shape[-2:], self.config["patch_size"]
        padded = pad(pixel_values, (0, -size[1] % patch, 0, -size[0] % patch))
        grid = padded.shape[-2] // patch, padded.shape[-1] // patch
        patches = self._encode(tensors, padded, grid)
        if "decode_head.cls_emb" in tensors:
            scores = self._mask_head(tensors, patches).transpose(1, 2).unflatten(2, grid)
        elif "decode_head.norm.weight" in tensors:
            scores = self._upsampling_head(tensors, patches, grid)
        else:
            maps = patches.transpose(1, 2).unflatten(2, grid)
            scores = conv2d(maps, tensors["decode_head.conv_seg.weight"], tensors["decode_head.conv_seg.bias"])
        return interpolate(scores, size=size, mode="bilinear")

    def _encode(self, tensors: Tensors, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (batch_size, N, hidden_size)."""
        name, eps = "backbone.patch_embed.projection", self.config["layer_norm_eps"]
        maps = conv2d(pixels, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), stride=self.config["patch_size"])
        patches = maps.flatten(2).transpose(1, 2)
        tokens = torch.cat([tensors["backbone.cls_token"].expand(len(patches), -1, -1), patches], dim=1)
        table = tensors["backbone.pos_embed"]
        if table.shape[1] != tokens.shape[1]:
            height, width = (side // self.config["patch_size"] for side in self.config["image_size"])
            stored = table[:, 1:].transpose(1, 2).unflatten(2, (height, width))
            resized = interpolate(stored, size=grid, mode=self.config["position_interpolation"])
            table = torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
        tokens = _layers(tensors, "backbone", tokens + table, self.config["num_attention_heads"], eps)
        if "backbone.ln1.weight" in tensors:
            tokens = _norm(tensors, "backbone.ln1", tokens, eps)
        return tokens[:, 1:]

    def _mask_head(self, tensors: Tensors, patches: Tensor) -> Tensor:
        """Scores (batch_size, N, num_labels)."""
        eps, count = self.config["decoder_layer_norm_eps"], patches.shape[1]
        classes = tensors["decode_head.cls_emb"].expand(len(patches), -1, -1)
        tokens = torch.cat([_linear(tensors, "decode_head.dec_proj", patches), classes], dim=1)
        tokens = _layers(tensors, "decode_head", tokens, self.config["decoder_num_attention_heads"], eps)
        tokens = _norm(tensors, "decode_head.decoder_norm", tokens, eps)
        patches = normalize(_linear(tensors, "decode_head.patch_proj", tokens[:, :count]), dim=2)
        classes = normalize(_linear(tensors, "decode_head.classes_proj", tokens[:, count:]), dim=2)
        return _norm(tensors, "decode_head.mask_norm", patches @ classes.transpose(1, 2), eps)

    def _upsampling_head(self, tensors: Tensors, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Scores (batch_size, num_labels, height, width)."""
        normed = _norm(tensors, "decode_head.norm", patches, self.config["decoder_layer_norm_eps"])
        maps, index = normed.transpose(1, 2).unflatten(2, grid), 0
        while (step := f"decode_head.up_convs.{index}.0") + ".conv.weight" in tensors:
            kernel = tensors[f"{step}.conv.weight"]
            mean, var = tensors[f"{step}.bn.running_mean"], tensors[f"{step}.bn.running_var"]
            scale, shift = tensors[f"{step}.bn.weight"], tensors[f"{step}.bn.bias"]
            maps = conv2d(maps, kernel, padding=kernel.shape[-1] // 2)
            maps = relu(batch_norm(maps, mean, var, scale, shift, eps=1e-5))
            maps = interpolate(maps, scale_factor=float(self.config["decoder_upscale"]), mode="bilinear")
            index += 1
        return conv2d(maps, tensors["decode_head.conv_seg.weight"], tensors["decode_head.conv_seg.bias"])


def _layers(tensors: Tensors, part: str, tokens: Tensor, num_heads: int, eps: float) -> Tensor:
    index = 0
    while (layer := f"{part}.layers.{index}") + ".ln1.weight" in tensors:
        normed = _norm(tensors, f"{layer}.ln1", tokens, eps)
        weight, bias = (tensors[f"{layer}.attn.attn.in_proj_{name}"] for name in ("weight", "bias"))
        qkv = linear(normed, weight, bias).unflatten(-1, (3, num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        tokens = tokens + _linear(tensors, f"{layer}.attn.attn.out_proj", attended)
        normed = _norm(tensors, f"{layer}.ln2", tokens, eps)
        hidden = gelu(_linear(tensors, f"{layer}.ffn.layers.0.0", normed))
        tokens = tokens + _linear(tensors, f"{layer}.ffn.layers.1", hidden)
        index += 1
    return tokens


def _linear(tensors: Tensors, name: str, hidden: Tensor) -> Tensor:
    return linear(hidden, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(tensors: Tensors, name: str, hidden: Tensor, eps: float) -> Tensor:
    weight = tensors[f"{name}.weight"]
    return layer_norm(hidden, weight.shape, weight, tensors[f"{name}.bias"], eps=eps)
