"""LookupViT: heavy work on a small grid of compressed tokens, light work on the full one."""

import math
from typing import Any

from .row import SEGMENTATION, Architecture, TokenStage

__all__ = ["LOOKUPVIT"]


def _grids(config: Any, height: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from ..modeling.configuration_lookupvit import compressed_grid

    grid = (*config.position_grid[:-2], *config.patch_grid(height, width))
    return grid, compressed_grid(grid, config.compressed_size)


def _stages(config: Any, height: int, width: int) -> list[TokenStage]:
    grid, compressed = _grids(config, height, width)
    return [TokenStage("", grid, config.patch_size, config.hidden_size, math.prod(compressed))]


def _facts(config: Any, auto_class: str) -> dict[str, Any]:
    facts = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "heads": config.num_attention_heads,
        "patch size": config.patch_size,
    }
    if config.num_frames > 1:
        facts |= {"frames": config.num_frames, "tubelet size": config.tubelet_size}
    return {**facts, "head": "linear"} if auto_class == SEGMENTATION else facts


def _settings(config: Any) -> dict[str, Any]:
    return {"compressed_size": config.compressed_size, "compressed_sizes": list(config.compressed_sizes)}


def _pixel_shape(config: Any, height: int, width: int) -> tuple[int, ...]:
    frames = () if config.num_frames == 1 else (config.num_frames,)
    return (1, *frames, config.num_channels, height, width)


def _card(config: Any) -> list[str]:
    grid = " x ".join(map(str, config.position_grid))
    videos = f", videos of {config.num_frames} frames or any other number that {config.tubelet_size} divides"
    return [
        "A vision transformer with two streams of tokens: a small grid of compressed tokens does the heavy work, and "
        "the tokens of the full grid look its result up by the same attention (LookupViT, arXiv 2407.12753).",
        "",
        f"- Encoder: {config.num_hidden_layers} blocks, {config.hidden_size} wide, {config.num_attention_heads} heads, "
        f"patches of {config.patch_size} pixels, positions for a {grid} grid; any image size works"
        f"{videos if config.num_frames > 1 else ''}.",
        f"- Budget: compressed size {_named(config.compressed_size)}, trained at "
        f"{', '.join(map(_named, config.compressed_sizes))}; change it at load with `compressed_size=...`.",
    ]


def _named(size: Any) -> str:
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


CITATION = """@inproceedings{koner2024lookupvit,
  title     = {LookupViT: Compressing Visual Information to a Limited Number of Tokens},
  author    = {Koner, Rajat and Jain, Gagan and Jain, Prateek and Tresp, Volker and Paul, Sujoy},
  booktitle = {European Conference on Computer Vision},
  year      = {2024},
  note      = {arXiv:2407.12753}
}"""

LOOKUPVIT = Architecture(
    model_type="lookupvit",
    classes={
        "AutoConfig": "ailurus_hf.modeling.configuration_lookupvit:LookupViTConfig",
        "AutoImageProcessor": "ailurus_hf.modeling.image_processing_ailurus:AiluRusImageProcessor",
        "AutoModel": "ailurus_hf.modeling.modeling_lookupvit:LookupViTModel",
        "AutoBackbone": "ailurus_hf.modeling.modeling_lookupvit:LookupViTBackbone",
        SEGMENTATION: "ailurus_hf.modeling.modeling_lookupvit:LookupViTForSemanticSegmentation",
        "AutoModelForImageClassification": "ailurus_hf.modeling.modeling_lookupvit:LookupViTForImageClassification",
        "AutoModelForVideoClassification": "ailurus_hf.modeling.modeling_lookupvit:LookupViTForVideoClassification",
    },
    stages=_stages,
    facts=_facts,
    card=_card,
    settings=_settings,
    extra_flops=lambda config, stages: 0,  # matrix products and convolutions alone
    budget="compressed_size",
    example="compressed_size=5",
    pixel_shape=_pixel_shape,
    citation=CITATION,
)
