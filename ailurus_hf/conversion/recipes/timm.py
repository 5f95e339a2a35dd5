"""The recipe for timm's `VisionTransformer`: a folder (or Hub name) with timm's `config.json`, or a bare weight file.

timm (https://github.com/huggingface/pytorch-image-models). Facts of its code kept here:

- LayerNorm eps is 1e-6, the GELU is exact;
- positions are resized bicubically with antialiasing, to the exact size, whenever the grid differs;
- tokens are class, (distillation,) registers, patches; with `no_embed_class` only patches have positions, else all do;
- `global_pool="avg"` takes the mean of the patch tokens, then `fc_norm`; such models often have no `norm`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...utils.errors import CheckpointError
from ..reading.settings import Settings
from ..reading.sources import TWINS, choose_entry, license_of, read_json_beside, read_tensors, tensors_of
from ..recipe import Pictures, Plan, Recipe, Sign, SourceCheckpoint
from ..references.pictures import Preprocessing
from .timm_style import BARE, BLOCK, IN_MODEL, TimmParts, encoder_plan, encoder_settings, position_settings

__all__ = ["RECIPE", "plan_timm", "read_timm"]

# constructor arguments that change what the model computes, and the values of the model that can be ported
PLAIN_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "act_layer": (None, "gelu"),
    "norm_layer": (None, "layernorm"),
    "pre_norm": (False,),
    "pool_include_prefix": (False,),
    "pos_embed": ("learn",),
}
UNPORTED_PARTS = {
    "norm_pre.weight": "a norm before the first block (pre_norm)",
    "attn_pool.latent": "attention pooling (global_pool='map')",
    "blocks.0.attn.norm.weight": "a norm inside the attention (scale_attn_norm)",
}
CLASSIFIERS = {"head": "classifier", "head_dist": "distillation_classifier"}
POOLINGS = {"token": "cls", "avg": "mean"}
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers

CITATION = """@misc{rw2019timm,
  title  = {PyTorch Image Models},
  author = {Wightman, Ross},
  year   = {2019},
  note   = {https://github.com/huggingface/pytorch-image-models}
}"""


def read_timm(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read the weights and, when it is beside them, timm's `config.json`.

    Checkpoints of timm's training script hold its arguments beside the weights.

    Raises:
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    content = read_tensors(weights, objects=True)
    entry, notes = choose_entry(content, weights, TWINS, entry)
    return SourceCheckpoint(weights, tensors_of(content, weights, entry), read_json_beside(weights), notes)


def plan_timm(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors and, where there is one, `config.json`.

    Raises:
        CheckpointError: the tensors are not those of a plain ViT, a setting is not supported, or neither tells the
            number of heads or the grid.
    """
    parts = TimmParts(checkpoint.tensors)
    description = Settings(checkpoint.description, "config.json: ")
    arguments = description.section("model_args", default={})
    pretrained = description.section("pretrained_cfg", default={}).values or checkpoint.description
    _check_plain(checkpoint, parts, arguments)
    config = encoder_settings(
        checkpoint,
        parts,
        image_size=_image_size(arguments, pretrained),
        prefix_positions=0 if arguments.values.get("no_embed_class") else None,
        heads=arguments.values.get("num_heads"),
    )
    config |= position_settings(antialias=True)
    config["pooling"] = _pooling(checkpoint, config, arguments.values)
    license = pretrained.get("license")
    classifiers = {name: target for name, target in CLASSIFIERS.items() if parts.has(f"{name}.weight")}
    return encoder_plan(
        checkpoint,
        parts,
        config,
        classifiers=classifiers,
        recorded=None if classifiers else {"tokens": "last_hidden_state", "logits": "pooler_output"},
        pictures=_pictures(pretrained, classify=bool(classifiers)),
        license=license if isinstance(license, str) else license_of(checkpoint.weights_path.parent),
    )


def _check_plain(checkpoint: SourceCheckpoint, parts: TimmParts, arguments: Settings) -> None:
    for name, what in UNPORTED_PARTS.items():
        if parts.has(name):
            raise CheckpointError(f"{checkpoint.weights_path} has {what}, which cannot be ported")
    for name, values in PLAIN_ARGUMENTS.items():
        if name in arguments.values:
            arguments.choice(name, values)


def _pooling(checkpoint: SourceCheckpoint, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    named = arguments.get("global_pool", checkpoint.description.get("global_pool"))
    if named in POOLINGS:
        return POOLINGS[named]
    if named and "head.weight" in checkpoint.tensors:
        raise CheckpointError(f"config.json: global_pool must be 'token' or 'avg', got {named!r}")
    return "mean" if config["use_pooler_norm"] or not config["use_cls_token"] else "cls"


def _image_size(arguments: Settings, pretrained: Mapping[str, Any]) -> list[int] | None:
    """The trained (height, width) in pixels; `None` when the config does not say."""
    if arguments.values.get("img_size") is not None:
        return arguments.pair("img_size")
    size = pretrained.get("input_size")  # channels, height, width
    return Settings({"input_size": size[1:]}, "config.json: ").pair("input_size") if isinstance(size, list) else None


def _pictures(pretrained: Mapping[str, Any], classify: bool) -> Pictures:
    """Normalisation and, for classifiers, timm's evaluation: resize the shorter side, then cut out the middle."""
    settings = Settings(pretrained, "config.json: ")
    mean, std = (settings.numbers(name, [0.5, 0.5, 0.5]) for name in ("mean", "std"))
    processor: dict[str, Any] = {"image_mean": mean, "image_std": std}
    size = pretrained.get("input_size")
    if classify and isinstance(size, list) and len(size) == 3:
        # timm resizes to input / crop_pct, so that the crop cuts out that share
        shortest = math.floor(min(size[1:]) / float(pretrained.get("crop_pct") or 0.875))
        resample, (height, width) = RESAMPLING.get(str(pretrained.get("interpolation")), 3), size[1:]
        processor |= {
            "do_resize": True,
            "size": {"shortest_edge": shortest},
            "resample": resample,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
        return Pictures(processor, preprocess=Preprocessing(mean, std, 1.0, False, shortest, resample, (height, width)))
    return Pictures(processor, preprocess=Preprocessing(mean, std))


RECIPE = Recipe(
    title="timm",
    url="https://github.com/huggingface/pytorch-image-models",
    citation=CITATION,
    signs=(
        Sign(
            "config.json with timm's 'architecture', and tensors named blocks.0.attn.qkv.weight",
            lambda e: e.has(BLOCK) and "architecture" in e.config,
        ),
        Sign(
            "an entry 'state_dict' with tensors named blocks.0.attn.qkv.weight",
            lambda e: e.has(BLOCK) and not {"state_dict", "state_dict_ema"}.isdisjoint(e.container),
        ),
        IN_MODEL,
        BARE,
    ),
    read=read_timm,
    plan=plan_timm,
)
