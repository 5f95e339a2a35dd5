"""SegFormer: four stages, each with a grid, a width and a budget of its own."""

from itertools import accumulate
from operator import mul
from typing import Any

from .row import SEGMENTATION, Architecture, TokenStage, merge_settings, num_kept

__all__ = ["AILURUS_SEGFORMER"]


def _stages(config: Any, height: int, width: int) -> list[TokenStage]:
    stages = zip(
        config.stage_grids(height, width),
        accumulate(config.strides, mul),
        config.hidden_sizes,
        config.stage_ratios,
        strict=True,
    )
    return [
        TokenStage(f"stage {number}", grid, pixels, size, _num_kept(config, grid, ratio))
        for number, (grid, pixels, size, ratio) in enumerate(stages, start=1)
    ]


def _num_kept(config: Any, grid: tuple[int, int], ratio: float) -> int:
    # An exact count is for the stages that merge at all.
    return num_kept(grid[0] * grid[1], ratio, None if ratio == 1 else config.num_clusters)


def _facts(config: Any, auto_class: str) -> dict[str, Any]:
    facts = {
        "blocks": list(config.depths),
        "hidden sizes": list(config.hidden_sizes),
        "heads": list(config.num_attention_heads),
        "reduction": list(config.sr_ratios),
    }
    return {**facts, "head": config.decoder_type} if auto_class == SEGMENTATION else facts


def _settings(config: Any) -> dict[str, Any]:
    return {**merge_settings(config), "stage_keep_ratios": list(config.stage_ratios)}


def _card(config: Any) -> list[str]:
    budget = f"{config.num_clusters} tokens in each stage that merges" if config.num_clusters else "by these shares"
    return [
        "A SegFormer that runs the later blocks of its stages on fewer tokens: after "
        f"{config.num_dense_layers} blocks of a stage similar neighbouring tokens are merged, and the full grid comes "
        "back at the stage's end (AiluRus, arXiv 2311.01197, in SegFormer, arXiv 2105.15203).",
        "",
        f"- Encoder: stages of {_listed(config.depths)} blocks, {_listed(config.hidden_sizes)} wide, "
        f"{_listed(config.num_attention_heads)} heads; images of at least {config.min_image_size} pixels a side.",
        f"- Budget: {budget}; tokens kept per stage: {_listed(config.stage_ratios)}. Change it at load with "
        "`stage_keep_ratios=...`, or with `keep_ratio=...` (1 merges nothing).",
    ]


def _listed(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


AILURUS_SEGFORMER = Architecture(
    model_type="ailurus_segformer",
    classes={
        "AutoConfig": "ailurus_hf.modeling.configuration_ailurus_segformer:AiluRusSegformerConfig",
        "AutoImageProcessor": "ailurus_hf.modeling.image_processing_ailurus:AiluRusImageProcessor",
        "AutoModel": "ailurus_hf.modeling.modeling_ailurus_segformer:AiluRusSegformerModel",
        "AutoBackbone": "ailurus_hf.modeling.modeling_ailurus_segformer:AiluRusSegformerBackbone",
        SEGMENTATION: "ailurus_hf.modeling.modeling_ailurus_segformer:AiluRusSegformerForSemanticSegmentation",
    },
    stages=_stages,
    facts=_facts,
    card=_card,
    settings=_settings,
)
