"""Tiny checkpoints in the official Segmenter layout, with random weights."""

from pathlib import Path
from typing import Any

import torch
import yaml

from ailurus_hf.conversion.references.segmenter import SegmenterForward

PATCH = 8
LAYERS = 3
# The original's formulas for the checkpoints below.
REFERENCE = SegmenterForward(
    {
        "patch_size": PATCH,
        "image_size": (24, 32),
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-5,
        "decoder_num_attention_heads": 1,
        "position_interpolation": "bilinear",
        "position_resize_rule": "count",
    }
)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as the original does, with Python's tag."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", list(value))
)


def segmenter_variant(
    decoder: str = "linear", distilled: bool = False, image_size: tuple[int, int] = (24, 32), width: int = 64
) -> dict[str, Any]:
    """The content of `variant.yml`, with the entries that the converter reads and some that it does not."""
    head = {"name": "linear", "n_cls": 5}
    if decoder == "mask_transformer":
        head = {"name": "mask_transformer", "n_cls": 5, "n_layers": 2, "dropout": 0.1, "drop_path_rate": 0.0}
    net = {
        "backbone": "vit_tiny_patch16_384",
        "d_model": width,
        "decoder": head,
        "distilled": distilled,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "image_size": image_size,
        "n_cls": 5,
        "n_heads": 4,
        "n_layers": LAYERS,
        "normalization": "deit" if distilled else "vit",
        "patch_size": PATCH,
    }
    return {
        "dataset_kwargs": {"dataset": "toy", "image_size": 40, "normalization": net["normalization"]},
        "inference_kwargs": {"im_size": 48, "window_size": 32, "window_stride": 24},
        "net_kwargs": net,
        "version": "normal",
    }


def segmenter_tensors(variant: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the official names; norms and biases are random too, so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0)
        for name, shape in segmenter_shapes(variant).items()
    }


def segmenter_shapes(variant: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint."""
    net = variant["net_kwargs"]
    width, classes, prefix = net["d_model"], net["n_cls"], 1 + net["distilled"]
    patches = net["image_size"][0] * net["image_size"][1] // PATCH**2
    shapes = {"encoder.cls_token": (1, 1, width), "encoder.pos_embed": (1, prefix + patches, width)}
    shapes |= {"encoder.patch_embed.proj.weight": (width, 3, PATCH, PATCH), "encoder.patch_embed.proj.bias": (width,)}
    shapes |= (
        _blocks("encoder", net["n_layers"], width) | _affine("encoder.norm", width) | _linear("encoder.head", 10, width)
    )
    if net["distilled"]:
        shapes |= {"encoder.dist_token": (1, 1, width), **_linear("encoder.head_dist", 10, width)}
    if net["decoder"]["name"] == "linear":
        return shapes | _linear("decoder.head", classes, width)
    shapes |= {"decoder.cls_emb": (1, classes, width), **_linear("decoder.proj_dec", width, width)}
    shapes |= {"decoder.proj_patch": (width, width), "decoder.proj_classes": (width, width)}
    shapes |= _blocks("decoder", net["decoder"]["n_layers"], width)
    return shapes | _affine("decoder.decoder_norm", width) | _affine("decoder.mask_norm", classes)


def write_segmenter(folder: Path, variant: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write `checkpoint.pth` and `variant.yml`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {"model": tensors or segmenter_tensors(variant), "n_cls": 5, "epoch": 1}
    torch.save(checkpoint, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(yaml.dump(variant, Dumper=_Dumper))
    return folder


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(part: str, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in (f"{part}.blocks.{layer}" for layer in range(layers)):
        shapes |= _affine(f"{block}.norm1", width) | _linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _linear(f"{block}.attn.proj", width, width) | _affine(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.mlp.fc1", 4 * width, width) | _linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes
