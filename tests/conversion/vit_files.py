"""Small checkpoints with timm's names, random but in every tensor, for the recipes that read them."""

import json
from pathlib import Path
from typing import Any

import torch

WIDTH, PATCH, LAYERS, HEADS = 32, 8, 3, 4
PARTS = (
    "cls_token dist_token reg_token register_tokens mask_token ls fc_norm norm head head_dist qk_norm swiglu qkv_bias"
)


def vit_tensors(
    parts: str = "cls_token norm qkv_bias",
    grid: tuple[int, int] = (4, 4),
    position_rows: int = 1,
    patch: int = PATCH,
    prefix: str = "",
    chunks: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a ViT that has these parts, a choice of `PARTS`; two registers, five classes."""
    has = set(parts.split())
    assert has <= set(PARTS.split())
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, position_rows + grid[0] * grid[1], WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
    }
    tokens = {"cls_token": 1, "dist_token": 1, "reg_token": 2, "register_tokens": 2}
    shapes |= {name: (1, count, WIDTH) for name, count in tokens.items() if name in has}
    shapes |= {name: (1, WIDTH) for name in ("mask_token",) if name in has}
    for layer in range(LAYERS):
        block = f"blocks.{layer // 2}.{layer}" if chunks else f"blocks.{layer}"
        shapes |= _block(block, has)
    for name in ("norm", "fc_norm"):
        shapes |= _affine(name, WIDTH) if name in has else {}
    for name in ("head", "head_dist"):
        shapes |= _linear(name, 5, WIDTH) if name in has else {}
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix + name: torch.randn(shape, generator=generator) * 0.2
        + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }


def write_timm(folder: Path, tensors: dict[str, torch.Tensor], **arguments: Any) -> Path:
    """Write `pytorch_model.bin` and timm's `config.json` with these `model_args`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "crop_pct": 0.8}
    pretrained |= {"interpolation": "bilinear", "license": "cc-by-4.0"}
    config = {"architecture": "vit_tiny", "model_args": {"num_heads": HEADS, **arguments}, "pretrained_cfg": pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _block(block: str, has: set[str]) -> dict[str, tuple[int, ...]]:
    shapes = _affine(f"{block}.norm1", WIDTH) | _linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
    if "qkv_bias" not in has:
        del shapes[f"{block}.attn.qkv.bias"]
    shapes |= _linear(f"{block}.attn.proj", WIDTH, WIDTH) | _affine(f"{block}.norm2", WIDTH)
    if "swiglu" in has:
        shapes |= _linear(f"{block}.mlp.w12", 48, WIDTH) | _linear(f"{block}.mlp.w3", WIDTH, 24)
    else:
        shapes |= _linear(f"{block}.mlp.fc1", 48, WIDTH) | _linear(f"{block}.mlp.fc2", WIDTH, 48)
    if "ls" in has:
        shapes |= {f"{block}.ls{index}.gamma": (WIDTH,) for index in (1, 2)}
    if "qk_norm" in has:
        shapes |= _affine(f"{block}.attn.q_norm", WIDTH // HEADS) | _affine(f"{block}.attn.k_norm", WIDTH // HEADS)
    return shapes


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
