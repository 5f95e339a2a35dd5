"""Models to time, by name: real sizes, random weights, nothing from the network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SamVisionConfig,
    SamVisionModel,
)

from ..adapters import apply_ailurus
from ..modeling.configuration_ailurus import AiluRusConfig
from ..modeling.configuration_ailurus_segformer import AiluRusSegformerConfig
from ..modeling.configuration_lookupvit import LookupViTConfig
from ..modeling.modeling_ailurus import AiluRusModel
from ..modeling.modeling_ailurus_segformer import AiluRusSegformerForSemanticSegmentation
from ..modeling.modeling_lookupvit import LookupViTModel

__all__ = ["CASES", "Case"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A model that can be timed.

    Attributes:
        size: height and width of the images where none are given, in pixels.
        build: makes the model for images of a size.
        plain: makes the model it is compared with; None for `build` with keep_ratio=1, whose outputs are the same.
    """

    size: Size
    build: Callable[[Size], Any]
    plain: Callable[[Size], Any] | None = None


def _sizes(width: int, depth: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}


TINY, SMALL, BASE, LARGE = _sizes(32, 4, 4), _sizes(384, 12, 6), _sizes(768, 12, 12), _sizes(1024, 24, 16)


def _vit(shape: dict[str, int], **settings: Any) -> Callable[[Size], Any]:
    config: dict[str, Any] = {**shape, "intermediate_size": 4 * shape["hidden_size"], **settings}
    return lambda size: AiluRusModel(AiluRusConfig(**{**config, "image_size": size}))


def _segformer(depths: tuple[int, ...], widths: tuple[int, ...], decoder: int) -> Callable[[Size], Any]:
    config: dict[str, Any] = {"depths": depths, "hidden_sizes": widths, "decoder_hidden_size": decoder}
    config |= {"num_attention_heads": (1, 2, 5, 8), "num_labels": 19, "upsample_logits": False}
    return lambda size: AiluRusSegformerForSemanticSegmentation(AiluRusSegformerConfig(**config))


def _depth_anything(shape: dict[str, int], taps: list[int], neck: list[int], fusion: int) -> Callable[[Size], Any]:
    backbone = {**shape, "patch_size": 14, "image_size": 518, "out_indices": taps, "reshape_hidden_states": False}
    config: dict[str, Any] = {"patch_size": 14, "reassemble_hidden_size": shape["hidden_size"]}
    config |= {"neck_hidden_sizes": neck, "fusion_hidden_size": fusion}
    return lambda size: apply_ailurus(
        DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=Dinov2Config(**backbone), **config))
    )


def _lookupvit(size: Size) -> Any:
    sizes = [side for side in (3, 5, 7, 10, 16) if 16 * side <= min(size)]
    config: dict[str, Any] = {**BASE, "image_size": size, "compressed_sizes": sizes, "compressed_size": sizes[-1]}
    return LookupViTModel(LookupViTConfig(**config))


CASES = {
    "tiny": Case((64, 64), _vit(TINY, patch_size=8)),  # to see that everything runs
    "vit_s": Case((640, 640), _vit(SMALL)),
    "vit_b": Case((640, 640), _vit(BASE)),
    "vit_l": Case((640, 640), _vit(LARGE)),
    "segformer_b0": Case((512, 1024), _segformer((2, 2, 2, 2), (32, 64, 160, 256), 256)),
    "segformer_b2": Case((512, 1024), _segformer((3, 4, 6, 3), (64, 128, 320, 512), 768)),
    "segformer_b5": Case((512, 1024), _segformer((3, 6, 40, 3), (64, 128, 320, 512), 768)),
    "lookupvit_b": Case((384, 384), _lookupvit, _vit(BASE, use_cls_token=False)),
    "depth_anything_s": Case((518, 518), _depth_anything(SMALL, [3, 6, 9, 12], [48, 96, 192, 384], 64)),
    "depth_anything_b": Case((518, 518), _depth_anything(BASE, [3, 6, 9, 12], [96, 192, 384, 768], 128)),
    "depth_anything_l": Case((518, 518), _depth_anything(LARGE, [5, 12, 18, 24], [256, 512, 1024, 1024], 256)),
    "dinov3_b": Case(
        (1024, 1024),
        lambda size: apply_ailurus(
            DINOv3ViTModel(DINOv3ViTConfig(**BASE, intermediate_size=3072, num_register_tokens=4))
        ),
    ),
    "sam_b": Case((1024, 1024), lambda size: apply_ailurus(SamVisionModel(SamVisionConfig(image_size=size[0])))),
}
