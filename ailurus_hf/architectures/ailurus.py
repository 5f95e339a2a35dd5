"""The plain vision transformer."""

from typing import Any

from .row import SEGMENTATION, Architecture, TokenStage

__all__ = ["AILURUS"]


def _stages(config: Any, height: int, width: int) -> list[TokenStage]:
    rows, columns = config.patch_grid(height, width)
    kept = config.num_groups(rows * columns)
    return [TokenStage("", (rows, columns), config.patch_size, config.hidden_size, kept)]


def _facts(config: Any, auto_class: str) -> dict[str, Any]:
    facts = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "heads": config.num_attention_heads,
        "patch size": config.patch_size,
    }
    return {**facts, "head": config.decode_head.type} if auto_class == SEGMENTATION else facts


def _card(config: Any) -> list[str]:
    height, width = config.grid_size
    if config.places and config.keep_ratio < 1:
        budget = ", ".join(f"{ratio:.0%} of the tokens from layer {place} on" for place, ratio in config.places)
    else:
        budget = f"{config.num_clusters} tokens" if config.num_clusters else f"{config.keep_ratio:.0%} of the tokens"
        budget += f" from layer {config.num_dense_layers} on"
    return [
        "A plain vision transformer that runs most of its layers on fewer tokens: after "
        f"{config.num_dense_layers} layers similar neighbouring patches are merged, and the full grid comes back at "
        "the end (AiluRus, arXiv 2311.01197).",
        "",
        f"- Encoder: {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads, "
        f"patches of {config.patch_size} pixels, positions for a {height} x {width} grid; any image size works.",
        f"- Budget: {budget}; change it at load with `keep_ratio=...` (1 merges nothing).",
    ]


AILURUS = Architecture(
    model_type="ailurus",
    classes={
        "AutoConfig": "ailurus_hf.modeling.configuration_ailurus:AiluRusConfig",
        "AutoImageProcessor": "ailurus_hf.modeling.image_processing_ailurus:AiluRusImageProcessor",
        "AutoModel": "ailurus_hf.modeling.modeling_ailurus:AiluRusModel",
        "AutoBackbone": "ailurus_hf.modeling.modeling_ailurus:AiluRusBackbone",
        SEGMENTATION: "ailurus_hf.modeling.modeling_ailurus:AiluRusForSemanticSegmentation",
        "AutoModelForImageClassification": "ailurus_hf.modeling.modeling_ailurus:AiluRusForImageClassification",
    },
    stages=_stages,
    facts=_facts,
    card=_card,
)
