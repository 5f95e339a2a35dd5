"""The forward of mmsegmentation's Segmenter and SETR models as plain functions of a checkpoint's tensors.

It shares no code with the models of this package, so that a converted model can be checked against it.
"""

from functools import reduce

from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, interpolate, relu

from .segmenter import SegmenterForward
from .vit import Tensors, norm

__all__ = ["MmsegForward"]

# Parts of mmsegmentation's names -> the official Segmenter's, replaced in this order.
NAMES = {
    "backbone.ln1.": "encoder.norm.",
    "backbone.": "encoder.",
    "decode_head.": "decoder.",
    "patch_embed.projection.": "patch_embed.proj.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
    ".layers.": ".blocks.",
    ".ln": ".norm",
    ".attn.attn.in_proj_": ".attn.qkv.",
    ".attn.attn.out_proj.": ".attn.proj.",
    ".dec_proj.": ".proj_dec.",
    ".patch_proj.weight": ".proj_patch",
    ".classes_proj.weight": ".proj_classes",
    ".conv_seg.": ".head.",
}


class MmsegForward(SegmenterForward):
    """The forward of one checkpoint, called with (tensors, pixel_values); `config` as found by the recipe."""

    def __call__(self, tensors: Tensors, pixel_values: Tensor) -> Tensor:
        """Logits (batch_size, num_labels, height, width)."""
        own = {reduce(lambda text, part: text.replace(*part), NAMES.items(), key): tensors[key] for key in tensors}
        # linear layers here, factors on the right there
        own |= {name: own[name].T for name in ("decoder.proj_patch", "decoder.proj_classes") if name in own}
        return super().__call__(own, pixel_values)

    def _head(self, own: Tensors, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if "up_convs.0.0.conv.weight" not in own:
            return super()._head(own, patches, grid)
        maps = norm(own, "norm", patches, self.config["decoder_layer_norm_eps"]).transpose(1, 2).unflatten(2, grid)
        index = 0
        while (name := f"up_convs.{index}.0") + ".conv.weight" in own:
            kernel = own[f"{name}.conv.weight"]
            mean, var = own[f"{name}.bn.running_mean"], own[f"{name}.bn.running_var"]
            scale, shift = own[f"{name}.bn.weight"], own[f"{name}.bn.bias"]
            maps = conv2d(maps, kernel, padding=kernel.shape[-1] // 2)
            maps = relu(batch_norm(maps, mean, var, scale, shift, eps=1e-5))
            maps = interpolate(maps, scale_factor=float(self.config["decoder_upscale"]), mode="bilinear")
            index += 1
        return conv2d(maps, own["head.weight"], own["head.bias"])
