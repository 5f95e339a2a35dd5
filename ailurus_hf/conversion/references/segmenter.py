"""Segmenter's forward as plain functions of the tensors of an official checkpoint, under their original names.

It shares no code with the models of this package, so that a converted model can be checked against it. Formulas:
Strudel et al., ICCV 2021, section 3, and the facts listed in `ailurus_hf.conversion.recipes.segmenter`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear, pad

__all__ = ["segmenter_logits"]

Tensors = Mapping[str, Tensor]


def segmenter_logits(
    tensors: Tensors, pixel_values: Tensor, *, patch_size: int, grid_size: tuple[int, int], num_heads: int
) -> Tensor:
    """Compute the logits of an official Segmenter checkpoint.

    Args:
        tensors: the checkpoint's state dict, of one floating dtype.
        pixel_values: (batch_size, num_channels, height, width), normalised, of the same dtype.
        patch_size: side of a patch in pixels.
        grid_size: (height, width) in patches of the stored position table.
        num_heads: attention heads of the encoder.

    Returns:
        Logits (batch_size, num_labels, height, width).
    """
    height, width = pixel_values.shape[-2:]
    padded = pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
    grid = padded.shape[-2] // patch_size, padded.shape[-1] // patch_size
    patches = _encode(tensors, padded, patch_size, grid, grid_size, num_heads)
    if "decoder.cls_emb" in tensors:
        scores = _mask_decoder(tensors, patches)
    else:
        scores = _linear(tensors, "decoder.head", patches)
    scores = scores.transpose(1, 2).unflatten(2, grid)
    return interpolate(scores, size=padded.shape[-2:], mode="bilinear")[..., :height, :width]


def _encode(
    tensors: Tensors, pixels: Tensor, patch_size: int, grid: tuple[int, int], grid_size: tuple[int, int], num_heads: int
) -> Tensor:
    """Patch tokens (batch_size, height * width, hidden_size) after the encoder's last norm."""
    weight, bias = tensors["encoder.patch_embed.proj.weight"], tensors["encoder.patch_embed.proj.bias"]
    patches = torch.nn.functional.conv2d(pixels, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    prefix = [tensors[name] for name in ("encoder.cls_token", "encoder.dist_token") if name in tensors]
    tokens = torch.cat([*(token.expand(len(pixels), -1, -1) for token in prefix), patches], dim=1)
    tokens = tokens + _positions(tensors["encoder.pos_embed"], grid, grid_size, len(prefix))
    return _norm(tensors, "encoder.norm", _blocks(tensors, "encoder", tokens, num_heads))[:, len(prefix) :]


def _positions(table: Tensor, grid: tuple[int, int], grid_size: tuple[int, int], num_prefix: int) -> Tensor:
    """The position rows for a grid; resized only if their number differs, as the original does."""
    if table.shape[1] == num_prefix + grid[0] * grid[1]:
        return table
    stored = table[:, num_prefix:].transpose(1, 2).unflatten(2, grid_size)
    resized = interpolate(stored, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
    return torch.cat([table[:, :num_prefix], resized], dim=1)


def _mask_decoder(tensors: Tensors, patches: Tensor) -> Tensor:
    """Scores (batch_size, height * width, num_labels): cosines of patch and class tokens, normalised over classes."""
    class_tokens = tensors["decoder.cls_emb"].expand(len(patches), -1, -1)
    tokens = torch.cat([_linear(tensors, "decoder.proj_dec", patches), class_tokens], dim=1)
    # the decoder's heads are always 64 wide, whatever the encoder has
    tokens = _blocks(tensors, "decoder", tokens, num_heads=tokens.shape[-1] // 64)
    tokens = _norm(tensors, "decoder.decoder_norm", tokens)
    patches, classes = tokens.split([patches.shape[1], class_tokens.shape[1]], dim=1)
    patches, classes = patches @ tensors["decoder.proj_patch"], classes @ tensors["decoder.proj_classes"]
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    return _norm(tensors, "decoder.mask_norm", patches @ classes.transpose(1, 2))


def _blocks(tensors: Tensors, part: str, tokens: Tensor, num_heads: int) -> Tensor:
    layer = 0
    while (block := f"{part}.blocks.{layer}") + ".norm1.weight" in tensors:
        tokens = tokens + _attention(tensors, f"{block}.attn", _norm(tensors, f"{block}.norm1", tokens), num_heads)
        hidden = gelu(_linear(tensors, f"{block}.mlp.fc1", _norm(tensors, f"{block}.norm2", tokens)))
        tokens = tokens + _linear(tensors, f"{block}.mlp.fc2", hidden)
        layer += 1
    return tokens


def _attention(tensors: Tensors, name: str, tokens: Tensor, num_heads: int) -> Tensor:
    qkv = _linear(tensors, f"{name}.qkv", tokens).unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    return _linear(tensors, f"{name}.proj", (weights @ value).transpose(1, 2).flatten(2))


def _linear(tensors: Tensors, name: str, hidden: Tensor) -> Tensor:
    return linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _norm(tensors: Tensors, name: str, hidden: Tensor) -> Tensor:
    weight = tensors[f"{name}.weight"]
    return layer_norm(hidden, weight.shape, weight, tensors[f"{name}.bias"], eps=1e-5)
