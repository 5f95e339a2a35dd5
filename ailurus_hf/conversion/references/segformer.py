"""SegFormer's forward as plain functions of the tensors of a checkpoint of NVlabs or mmsegmentation.

It shares no code with the models of this package, so that a converted model can be checked against it. Formulas: Xie
et al., NeurIPS 2021, section 3, and the table in `ailurus_hf.conversion.recipes.segformer`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, gelu, interpolate, relu

from .vit import Tensors, linear, norm, under

__all__ = ["SegformerForward"]

# Parts of mmsegmentation's names -> NVlabs', whose stages are counted from 1; `#` stands for the stage's number.
NAMES = {
    r"backbone\.layers\.(\d+)\.0\.projection\.": "backbone.patch_embed#.proj.",
    r"backbone\.layers\.(\d+)\.0\.norm\.": "backbone.patch_embed#.norm.",
    r"backbone\.layers\.(\d+)\.1\.": "backbone.block#.",
    r"backbone\.layers\.(\d+)\.2\.": "backbone.norm#.",
    r"decode_head\.convs\.(\d+)\.conv\.": "decode_head.linear_c#.proj.",
    r"decode_head\.convs\.(\d+)\.bn\.": "decode_head.linear_c#.bn.",
}
PARTS = {
    ".attn.attn.in_proj_": ".attn.qkv.",
    ".attn.attn.out_proj.": ".attn.proj.",
    ".ffn.layers.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.dwconv.dwconv.",
    ".ffn.layers.4.": ".mlp.fc2.",
    "decode_head.fusion_conv.": "decode_head.linear_fuse.",
}


@dataclass(frozen=True)
class SegformerForward:
    """The forward of one checkpoint, called with (tensors, pixel_values); `config` as found by the recipe."""

    config: Mapping[str, Any]

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels, height, width)."""
        own = {_name(key): tensor for key, tensor in tensors.items()}
        maps, hidden = [], pixel_values
        for stage in range(len(self.config["depths"])):
            hidden = self._stage(under("backbone.", own), hidden, stage)
            maps.append(hidden)
        logits = self._head(under("decode_head.", own), maps)
        return interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")

    def _stage(self, own: Tensors, hidden: Tensor, stage: int) -> Tensor:
        eps, number = self.config["layer_norm_eps"], stage + 1
        patches = under(f"patch_embed{number}.", own)
        kernel = patches["proj.weight"]
        stride, padding = self.config["strides"][stage], kernel.shape[-1] // 2
        maps = conv2d(hidden, kernel, patches["proj.bias"], stride=stride, padding=padding)
        grid = maps.shape[-2:]
        tokens = norm(patches, "norm", maps.flatten(2).mT, self.config.get("patch_norm_eps", eps))
        for index in count():
            block = under(f"block{number}.{index}.", own)
            if not block:
                break
            tokens = tokens + self._attention(under("attn.", block), norm(block, "norm1", tokens, eps), grid, stage)
            tokens = tokens + _mlp(under("mlp.", block), norm(block, "norm2", tokens, eps), grid)
        return norm(own, f"norm{number}", tokens, eps).mT.unflatten(2, grid)

    def _attention(self, own: Tensors, tokens: Tensor, grid: torch.Size, stage: int) -> Tensor:
        heads, context = self.config["num_attention_heads"][stage], tokens
        if "sr.weight" in own:
            kernel = own["sr.weight"]
            maps = conv2d(tokens.mT.unflatten(2, grid), kernel, own["sr.bias"], stride=kernel.shape[-1])
            eps = self.config.get("reduction_norm_eps", self.config["layer_norm_eps"])
            context = norm(own, "norm", maps.flatten(2).mT, eps)
        if "qkv.weight" in own:  # the rows of the queries, then those of keys and values
            rows = len(own["qkv.weight"]) // 3
            parts = {"q": slice(rows), "kv": slice(rows, None)}
            own = {
                **own,
                **{f"{n}.{p}": own[f"qkv.{p}"][part] for n, part in parts.items() for p in ("weight", "bias")},
            }
        query = linear(own, "q", tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = linear(own, "kv", context).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
        return linear(own, "proj", (weights @ value).transpose(1, 2).flatten(2))

    def _head(self, own: Tensors, maps: list[Tensor]) -> Tensor:
        levels = []
        for number, level in enumerate(maps, start=1):
            layer = under(f"linear_c{number}.", own)
            projected = linear(layer, "proj", level.flatten(2).mT).mT.unflatten(2, level.shape[-2:])
            if "bn.weight" in layer:
                projected = _norm_and_relu(under("bn.", layer), projected)
            levels.append(interpolate(projected, size=maps[0].shape[-2:], mode="bilinear"))
        # NVlabs concatenates the last stage first; its head has no norms at the levels
        order = levels if "linear_c1.bn.weight" in own else levels[::-1]
        fused = conv2d(torch.cat(order, dim=1), own["linear_fuse.conv.weight"])
        fused = _norm_and_relu(under("linear_fuse.bn.", own), fused)
        classifier = "linear_pred" if "linear_pred.weight" in own else "conv_seg"
        return conv2d(fused, own[f"{classifier}.weight"], own[f"{classifier}.bias"])


def _mlp(own: Tensors, tokens: Tensor, grid: torch.Size) -> Tensor:
    hidden = linear(own, "fc1", tokens).mT.unflatten(2, grid)
    kernel, bias = own["dwconv.dwconv.weight"], own["dwconv.dwconv.bias"]
    hidden = conv2d(hidden, kernel, bias, padding=1, groups=len(kernel))
    return linear(own, "fc2", gelu(hidden.flatten(2).mT))


def _norm_and_relu(own: Tensors, maps: Tensor) -> Tensor:
    return relu(batch_norm(maps, own["running_mean"], own["running_var"], own["weight"], own["bias"], eps=1e-5))


def _name(key: str) -> str:
    for pattern, name in NAMES.items():
        if (found := re.match(pattern, key)) is not None:
            key = name.replace("#", str(int(found[1]) + 1)) + key[found.end() :]
    for old, new in PARTS.items():
        key = key.replace(old, new)
    return key
