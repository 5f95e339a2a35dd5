"""The recipe for plain ViTs of transformers: ViT, DeiT, ViT-MAE, DINOv2 (with registers or not) and I-JEPA.

The source is a folder with `config.json` and weights, whole or in shards, or a name on the Hub. Tensor names are those
of transformers 4, which nearly all files carry, or of transformers 5. What the native classes do is kept, also where it
differs from the original projects (positions resized to the exact size; LayerNorm eps of the config, often 1e-12), and
the result is compared with the native class itself.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...modeling.modeling_ailurus import AiluRusForImageClassification, AiluRusModel
from ...utils.errors import CheckpointError
from ..reading.settings import config_of
from ..reading.sources import choose_entry, license_of, read_json_beside, read_tensors, tensors_of
from ..recipe import Pictures, Plan, Recipe, Reference, Sign, SourceCheckpoint
from ..rules import PARAM, Drop, Rename, Rule, SplitRows, renames
from ..unsupported import refuse_unsupported
from .native_processor import native_pictures
from .timm_style import position_settings, rows_of

__all__ = ["FAMILIES", "RECIPE", "Family", "plan_transformers", "read_transformers", "transformers_rules"]


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    Args:
        name: what the names of its classes begin with.
        pooling: what the classifier looks at.
        dinov2_names: names of DINOv2's layers, else of ViT's.
        prefix_positions: rows of the position table before those of the patches: class and distillation token.
        antialias: whether positions are resized with a filter.
    """

    name: str
    pooling: str = "cls"
    dinov2_names: bool = False
    prefix_positions: int = 1
    antialias: bool = False

    def native_class(self, classifier: str | None = None) -> Any:
        """The class with this classifier, or that without a head; `None` where transformers has no such class."""
        return getattr(transformers, self.name + CLASSES[classifier], None)


FAMILIES: Mapping[str, Family] = {  # by model_type
    "vit": Family("ViT"),
    "deit": Family("DeiT", prefix_positions=2),
    "vit_mae": Family("ViTMAE"),
    "ijepa": Family("IJepa", pooling="mean", prefix_positions=0),
    "dinov2": Family("Dinov2", pooling="cls_mean", dinov2_names=True),
    "dinov2_with_registers": Family("Dinov2WithRegisters", pooling="cls_mean", dinov2_names=True, antialias=True),
}
# classifier in the source's names -> what the name of its class ends with
CLASSES: Mapping[str | None, str] = {
    None: "Model",
    "classifier": "ForImageClassification",
    "cls_classifier": "ForImageClassificationWithTeacher",
}
# by version of transformers: names in a layer -> ours
ATTENTION: Mapping[int, Mapping[str, str]] = {
    4: {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    },
    5: {"attention.{name:q_proj|k_proj|v_proj|o_proj}": "attention.{name}"},
}


def transformers_rules(
    family: Family, version: int, prefix: str, target: str, gated: bool = False, registers: bool = False
) -> tuple[Rule, ...]:
    """The whole table.

    Args:
        version: 4 or 5, the transformers whose names these are.
        prefix: what precedes the encoder's names, such as "vit." or "".
        target: what precedes the model's names, "ailurus." in a model with a classifier, else "".
        gated: whether the MLP is DINOv2's SwiGLU.
    """
    block = f"{prefix}encoder.layer.{{layer}}" if version == 4 or family.dinov2_names else f"{prefix}layers.{{layer}}"
    layer = f"{target}layers.{{layer}}"
    tokens = [("cls_token", family.prefix_positions > 0), ("distillation_token", family.prefix_positions > 1)]
    tokens += [("position_embeddings", True), ("register_tokens", registers)]
    return (
        *(Rename(f"{prefix}embeddings.{name}", f"{target}embeddings.{name}") for name, there in tokens if there),
        *_layer_rules(family, version, block, layer, gated),
        *renames({name: name for name in ("embeddings.patch_embeddings.projection", "layernorm")}, prefix, target),
        Drop(f"{prefix}embeddings.mask_token", "stands for masked patches, used only in pre-training", optional=True),
        Drop(f"{prefix}pooler.dense.{PARAM}", "a projection of the class token, unused by the heads", optional=True),
        Drop("decoder.{rest:*}", "the decoder that reconstructs pixels, used only in pre-training", optional=True),
    )


def _layer_rules(family: Family, version: int, block: str, layer: str, gated: bool) -> tuple[Rule, ...]:
    names = dict(ATTENTION[version])
    special: tuple[Rule, ...] = ()
    if family.dinov2_names:
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        scales = "{name:layer_scale1|layer_scale2}.lambda1"
        special += (Rename(f"{block}.{scales}", f"{layer}.{{name}}.lambda1"),)
    else:
        names |= {"{name:layernorm_before|layernorm_after}": "{name}"}
    if gated and version == 4:
        names |= {"mlp.weights_out": "mlp.down_proj"}
        fused = tuple(f"{layer}.mlp.{name}_proj.{{param}}" for name in ("gate", "up"))
        special += (SplitRows(f"{block}.mlp.weights_in.{PARAM}", fused),)
    elif gated:
        names |= {"mlp.{name:gate_proj|up_proj|down_proj}": "mlp.{name}"}
    elif version == 4 and not family.dinov2_names:
        names |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    else:
        names |= {"mlp.{name:fc1|fc2}": "mlp.{name}"}
    return renames(names, f"{block}.", f"{layer}.") + special


def read_transformers(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read `config.json` and the weights beside it.

    Raises:
        FileNotFoundError: `config.json` is missing.
        CheckpointError: a file is unreadable or unsafe, or of a family that is not ported.
    """
    description, config = read_json_beside(weights, needed_by="transformers"), weights.parent / "config.json"
    model_type = description.get("model_type")
    refuse_unsupported(weights.parent, model_type=model_type)
    if str(model_type) not in FAMILIES:
        raise CheckpointError(f"{config}: model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    if description.get("quantization_config"):
        raise CheckpointError(f"{config}: quantised weights cannot be converted; convert the full-precision checkpoint")
    content = read_tensors(weights)
    entry, notes = choose_entry(content, weights, ("state_dict",), entry)
    return SourceCheckpoint(weights, tensors_of(content, weights, entry), description, notes)


def plan_transformers(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from `config.json` and the tensor names.

    Raises:
        CheckpointError: a setting is not valid or not supported.
    """
    family = FAMILIES[checkpoint.description["model_type"]]
    config_class = CONFIG_MAPPING[checkpoint.description["model_type"]]
    native = config_of(config_class, checkpoint.description, len(checkpoint.tensors))
    known = [name for name in CLASSES if name is not None and family.native_class(name) is not None]
    classifier = next((name for name in known if f"{name}.weight" in checkpoint.tensors), None)
    config = _settings(native, family) | _label_settings(checkpoint, native, family, classifier)
    keys = checkpoint.tensors.keys()
    base = f"{family.native_class().base_model_prefix}."
    prefix = base if any(key.startswith(base) for key in keys) else ""
    # only names tell: the version in config.json is that of whoever saved it last, and 5 can write both
    version = 4 if any(".attention.attention." in key for key in keys) else 5
    target = "" if classifier is None else "ailurus."
    rules = transformers_rules(
        family, version, prefix, target, config["use_swiglu_ffn"], config["num_register_tokens"] > 0
    )
    height, width = config["image_size"]
    pictures = native_pictures(checkpoint.weights_path, native.model_type) or Pictures({})
    return Plan(
        config=config,
        rules=rules + _classifier_rules(classifier),
        processor=pictures.processor,
        model_class=AiluRusModel if classifier is None else AiluRusForImageClassification,
        reference=_native_forward(native, family, classifier),
        preprocess=pictures.preprocess,
        output="last_hidden_state" if classifier is None else "logits",
        resizes=height == width,  # the native classes take the square root of the number of positions
        license=license_of(checkpoint.weights_path.parent),
    )


def _settings(native: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """The fields of `AiluRusConfig` that the native config tells."""
    patch_size = _pair(native, "patch_size")
    if patch_size[0] != patch_size[1]:
        raise CheckpointError(f"config.json: patch_size must be square, got {patch_size}")
    gated = bool(getattr(native, "use_swiglu_ffn", False))
    return {
        "hidden_size": native.hidden_size,
        "num_hidden_layers": native.num_hidden_layers,
        "num_attention_heads": native.num_attention_heads,
        "intermediate_size": _intermediate_size(native, family, gated),
        "use_swiglu_ffn": gated,
        "hidden_act": native.hidden_act,
        "hidden_dropout_prob": native.hidden_dropout_prob,
        "attention_probs_dropout_prob": native.attention_probs_dropout_prob,
        "drop_path_rate": getattr(native, "drop_path_rate", 0.0),
        "initializer_range": native.initializer_range,
        "layer_norm_eps": native.layer_norm_eps,
        "image_size": _pair(native, "image_size"),
        "patch_size": patch_size[0],
        "num_channels": native.num_channels,
        "qkv_bias": native.qkv_bias,
        "layerscale_value": native.layerscale_value if family.dinov2_names else None,
        "use_cls_token": family.prefix_positions > 0,
        "use_distillation_token": family.prefix_positions > 1,
        "num_register_tokens": getattr(native, "num_register_tokens", 0),
        **position_settings(antialias=family.antialias),
    }


def _label_settings(
    checkpoint: SourceCheckpoint, native: PreTrainedConfig, family: Family, classifier: str | None
) -> dict[str, Any]:
    if classifier is None:
        return {}
    num_labels = rows_of(checkpoint, f"{classifier}.weight")
    settings: dict[str, Any] = {
        "num_labels": num_labels,
        "pooling": family.pooling,
        "use_distillation_classifier": classifier == "cls_classifier",
    }
    if len(native.id2label or {}) == num_labels:
        settings |= {"id2label": dict(native.id2label), "label2id": dict(native.label2id)}
    return settings


def _classifier_rules(classifier: str | None) -> tuple[Rule, ...]:
    names = {} if classifier is None else {classifier: "classifier"}
    if classifier == "cls_classifier":
        names["distillation_classifier"] = "distillation_classifier"
    return renames(names)


def _intermediate_size(native: PreTrainedConfig, family: Family, gated: bool) -> int:
    if not family.dinov2_names:
        return int(native.intermediate_size)
    hidden = int(native.hidden_size * native.mlp_ratio)
    # SwiGLU has three matrices for two: two thirds of the width, rounded up to a multiple of 8, as in DINOv2
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _pair(native: PreTrainedConfig, name: str) -> list[int]:
    value = getattr(native, name)
    return [value, value] if isinstance(value, int) else list(value)


def _native_forward(native: PreTrainedConfig, family: Family, classifier: str | None) -> Reference:
    """The native class on the same tensors, with nothing masked."""
    config = deepcopy(native)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # else three quarters of the patches are left out, at random

    def forward(tensors: Mapping[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        model = family.native_class(classifier).from_pretrained(
            None, config=deepcopy(config), state_dict=dict(tensors), dtype=pixel_values.dtype
        )
        arguments: dict[str, Any] = {}
        if not family.dinov2_names:  # those resize always
            arguments["interpolate_pos_encoding"] = list(pixel_values.shape[-2:]) != _pair(native, "image_size")
        if hasattr(config, "mask_ratio"):
            patch_height, patch_width = _pair(native, "patch_size")
            num_patches = pixel_values.shape[-2] // patch_height * (pixel_values.shape[-1] // patch_width)
            arguments["noise"] = torch.arange(num_patches).expand(len(pixel_values), -1)  # keeps the patches' order
        output = model(pixel_values, **arguments)
        result: torch.Tensor = output.last_hidden_state if classifier is None else output.logits
        return result

    return forward


RECIPE = Recipe(
    title="transformers",
    url="https://github.com/huggingface/transformers",
    signs=(Sign("config.json with a model_type of a plain ViT", lambda e: e.model_type in FAMILIES),),
    read=read_transformers,
    plan=plan_transformers,
    relatives=("segformer", "ailurus"),
)
