"""Segmenter's forward as a plain function of the tensors of an official checkpoint, under their original names.

It shares no code with the models of this package, so that a converted model can be checked against it. Formulas:
Strudel et al., ICCV 2021, section 3, and the facts listed in `ailurus_hf.conversion.recipes.segmenter`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from .vit import Tensors, ViTForward, linear, norm, run_blocks, under

__all__ = ["SegmenterForward"]


@dataclass(frozen=True)
class SegmenterForward:
    """The forward of one checkpoint, called with (tensors, pixel_values); `config` as found by the recipe."""

    config: Mapping[str, Any]

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels, height, width)."""
        (height, width), patch = pixel_values.shape[-2:], self.config["patch_size"]
        padded = pad(pixel_values, (0, -width % patch, 0, -height % patch))
        grid = padded.shape[-2] // patch, padded.shape[-1] // patch
        tokens = ViTForward(self.config, "encoder.")(tensors, padded)
        scores = self._head(under("decoder.", tensors), tokens[:, -grid[0] * grid[1] :], grid)
        if self.config.get("logits_resize") == "squeeze":
            return interpolate(scores, size=(height, width), mode="bilinear")
        return interpolate(scores, size=padded.shape[-2:], mode="bilinear")[..., :height, :width]

    def _head(self, own: Tensors, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Scores (batch_size, num_labels, rows, columns)."""
        scores = self._mask_scores(own, patches) if "cls_emb" in own else linear(own, "head", patches)
        return scores.transpose(1, 2).unflatten(2, grid)

    def _mask_scores(self, own: Tensors, patches: Tensor) -> Tensor:
        """Scores (batch_size, N, num_labels): cosines of patch and class tokens, normalised over classes."""
        eps, count = self.config.get("decoder_layer_norm_eps", self.config["layer_norm_eps"]), patches.shape[1]
        classes = own["cls_emb"].expand(len(patches), -1, -1)
        tokens = torch.cat([linear(own, "proj_dec", patches), classes], dim=1)
        tokens = run_blocks(own, tokens, self.config["decoder_num_attention_heads"], eps)
        tokens = norm(own, "decoder_norm", tokens, eps)
        patches = normalize(tokens[:, :count] @ own["proj_patch"], dim=-1)
        classes = normalize(tokens[:, count:] @ own["proj_classes"], dim=-1)
        return norm(own, "mask_norm", patches @ classes.transpose(1, 2), eps)
