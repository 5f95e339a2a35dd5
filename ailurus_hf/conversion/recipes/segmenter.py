"""The recipe for official Segmenter checkpoints: `checkpoint.pth` and `variant.yml`.

Segmenter (Strudel et al., ICCV 2021, arXiv 2105.05633, https://github.com/rstrudel/segmenter) is a plain ViT or
distilled DeiT encoder followed by a linear decoder or a mask transformer. Facts of the original code kept here:

- LayerNorm eps is 1e-5 everywhere, the MLPs are 4 times as wide as the tokens;
- positions are resized bilinearly, without antialiasing, and only when the number of tokens differs;
- the mask decoder has one head per 64 channels, whatever the encoder has;
- the encoder's ImageNet classifiers are stored but never used.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...utils.errors import CheckpointError
from ..reading.files import read_safetensors, read_torch_file, read_yaml, state_dict_of, strip_common_prefix
from ..recipe import Plan, Recipe, SourceCheckpoint
from ..references.segmenter import segmenter_logits
from ..rules import Drop, Rename, Rule, Transpose, match
from .timm_style import block_rules, mlp_rules

__all__ = ["RECIPE", "plan_segmenter", "read_segmenter", "segmenter_rules"]

NORMALIZATIONS = {
    "vit": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "deit": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
DECODER_HEAD_DIM = 64

CITATION = """@inproceedings{strudel2021segmenter,
  title     = {Segmenter: Transformer for Semantic Segmentation},
  author    = {Strudel, Robin and Garcia, Ricardo and Laptev, Ivan and Schmid, Cordelia},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}"""


def _block_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of one stack of transformer blocks, the same in encoder and mask decoder."""
    block, layer = f"{source}.blocks.{{layer}}", f"{target}.layers.{{layer}}"
    return (*block_rules(block, layer), *mlp_rules(block, layer))


ENCODER_RULES: tuple[Rule, ...] = (
    Rename("encoder.cls_token", "ailurus.embeddings.cls_token"),
    Rename("encoder.pos_embed", "ailurus.embeddings.position_embeddings"),
    Rename("encoder.patch_embed.proj.{param:weight|bias}", "ailurus.embeddings.patch_embeddings.projection.{param}"),
    *_block_rules("encoder", "ailurus"),
    Rename("encoder.norm.{param:weight|bias}", "ailurus.layernorm.{param}"),
    Drop("encoder.head.{param:weight|bias}", "the encoder's ImageNet classifier, unused by Segmenter", optional=True),
)
DISTILLED_RULES: tuple[Rule, ...] = (
    Rename("encoder.dist_token", "ailurus.embeddings.distillation_token"),
    Drop(
        "encoder.head_dist.{param:weight|bias}",
        "the encoder's ImageNet distillation classifier, unused by Segmenter",
        optional=True,
    ),
)
DECODER_RULES: Mapping[str, tuple[Rule, ...]] = {
    "linear": (Rename("decoder.head.{param:weight|bias}", "decode_head.classifier.{param}"),),
    "mask_transformer": (
        Rename("decoder.cls_emb", "decode_head.class_tokens"),
        Rename("decoder.proj_dec.{param:weight|bias}", "decode_head.projection.{param}"),
        *_block_rules("decoder", "decode_head"),
        Rename("decoder.decoder_norm.{param:weight|bias}", "decode_head.layernorm.{param}"),
        Transpose("decoder.proj_patch", "decode_head.patch_projection.weight"),
        Transpose("decoder.proj_classes", "decode_head.class_projection.weight"),
        Rename("decoder.mask_norm.{param:weight|bias}", "decode_head.mask_norm.{param}"),
    ),
}


def segmenter_rules(decoder_type: str, distilled: bool) -> tuple[Rule, ...]:
    """The whole table for a `"linear"` or `"mask_transformer"` decoder on a ViT or a distilled DeiT encoder."""
    return ENCODER_RULES + (DISTILLED_RULES if distilled else ()) + DECODER_RULES[decoder_type]


def read_segmenter(source: str | Path) -> SourceCheckpoint:
    """Read a checkpoint and the `variant.yml` beside it.

    Args:
        source: the weights file, or a folder with `checkpoint.pth`, `model.safetensors` or one other `.pth`.

    Raises:
        FileNotFoundError: the source, its weights or `variant.yml` are missing.
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    weights = _find_weights(Path(source))
    if weights.suffix == ".safetensors":
        tensors = state_dict_of({"model": read_safetensors(weights)}, weights, "model")
    else:
        tensors = state_dict_of(read_torch_file(weights), weights, "model")
    variant = weights.parent / "variant.yml"
    if not variant.is_file():
        raise FileNotFoundError(
            f"no variant.yml beside {weights}: official Segmenter checkpoints keep their settings there"
        )
    return SourceCheckpoint(weights, strip_common_prefix(tensors), read_yaml(variant))


def _find_weights(source: Path) -> Path:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; expected a Segmenter folder or its checkpoint.pth")
    if not source.is_dir():
        if not source.is_file():
            raise CheckpointError(f"{source} is neither a file nor a folder")
        return source
    for name in ("checkpoint.pth", "model.safetensors"):
        if (source / name).is_file():
            return source / name
    others = sorted(source.glob("*.pth"))
    if len(others) == 1:
        return others[0]
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"no checkpoint.pth in {source}, which holds {found}; name the file itself if it is one of them"
    )


def plan_segmenter(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from `variant.yml`.

    Raises:
        CheckpointError: a setting is missing, of the wrong type, or not supported.
    """
    net = _section(checkpoint.description, "net_kwargs")
    decoder = _section(net, "decoder", where="net_kwargs")
    config = _encoder_config(net) | _decoder_config(decoder, net)
    config |= _window_config(checkpoint.description)
    _check_number_of_blocks(checkpoint, config)
    processor, notes = _processor(checkpoint.description, net)
    reference = partial(
        segmenter_logits,
        patch_size=config["patch_size"],
        grid_size=tuple(side // config["patch_size"] for side in config["image_size"]),
        num_heads=config["num_attention_heads"],
    )
    rules = segmenter_rules(config["decoder_type"], config["use_distillation_token"])
    return Plan(config=config, rules=rules, processor=processor, reference=reference, pads_images=True, notes=notes)


def _encoder_config(net: Mapping[str, Any]) -> dict[str, Any]:
    hidden_size = _integer(net, "d_model")
    dropout = _number(net, "dropout", default=0.1)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": _integer(net, "n_layers"),
        "num_attention_heads": _integer(net, "n_heads"),
        "intermediate_size": 4 * hidden_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "drop_path_rate": _number(net, "drop_path_rate", default=0.0),
        "layer_norm_eps": 1e-5,
        "image_size": _image_size(net),
        "patch_size": _integer(net, "patch_size"),
        "num_channels": _integer(net, "channels", default=3),
        "num_labels": _integer(net, "n_cls"),
        "use_distillation_token": _flag(net, "distilled", default=False),
        "position_interpolation": "bilinear",
        "position_resize_rule": "count",
    }


def _decoder_config(decoder: Mapping[str, Any], net: Mapping[str, Any]) -> dict[str, Any]:
    name = decoder.get("name")
    if isinstance(name, str) and "linear" in name:  # the original tests it in this way
        return {"decoder_type": "linear"}
    if name != "mask_transformer":
        raise CheckpointError(
            f"variant.yml: net_kwargs.decoder.name must be 'linear' or 'mask_transformer', got {name!r}"
        )
    hidden_size = _integer(net, "d_model")
    if hidden_size < DECODER_HEAD_DIM:
        raise CheckpointError(
            f"variant.yml: net_kwargs.d_model must be at least {DECODER_HEAD_DIM} for a mask_transformer decoder "
            f"(one head per {DECODER_HEAD_DIM} channels), got {hidden_size}"
        )
    return {
        "decoder_type": "mask_transformer",
        "decoder_num_layers": _integer(decoder, "n_layers", where="net_kwargs.decoder"),
        "decoder_num_attention_heads": hidden_size // DECODER_HEAD_DIM,
        "decoder_intermediate_size": 4 * hidden_size,
        "decoder_dropout_prob": _number(decoder, "dropout", default=0.1, where="net_kwargs.decoder"),
    }


def _window_config(variant: Mapping[str, Any]) -> dict[str, int]:
    """Size and stride of the sliding windows, in pixels, where the variant has them."""
    inference = _section(variant, "inference_kwargs", default={})
    names = [name for name in ("window_size", "window_stride") if name in inference]
    return {name: _integer(inference, name, where="inference_kwargs") for name in names}


def _check_number_of_blocks(checkpoint: SourceCheckpoint, config: Mapping[str, Any]) -> None:
    """Refuse an absurd number of layers before a model of that depth is built."""
    for part, layers in (("encoder", config["num_hidden_layers"]), ("decoder", config.get("decoder_num_layers", 0))):
        norm = Rename(f"{part}.blocks.{{layer}}.{{rest:*}}", "")
        found = [int(values["layer"]) for key in checkpoint.tensors if (values := match(norm, key)) is not None]
        if layers > max(found, default=-1) + 1:
            raise CheckpointError(
                f"variant.yml gives the {part} {layers} layers, but {checkpoint.weights_path} holds blocks up to "
                f"{part}.blocks.{max(found, default=-1)}" + ("" if found else " (none)")
            )


def _processor(variant: Mapping[str, Any], net: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Preprocessing as in the original evaluation: the shorter side resized to `im_size`, then normalised.

    Without `inference_kwargs.im_size` the size is the training images' (`dataset_kwargs.image_size`), else the
    encoder's. The original limits the longer side too, by a ratio that depends on the data set and is not stored; it is
    left out.

    Where both places name a normalisation, the dataset's is used: it is what the weights were trained with.
    """
    dataset = _section(variant, "dataset_kwargs", default={})
    inference = _section(variant, "inference_kwargs", default={})
    names = [section["normalization"] for section in (dataset, net) if "normalization" in section]
    if not names or any(name not in NORMALIZATIONS for name in names):
        raise CheckpointError(f"variant.yml: normalization must be 'vit' or 'deit', got {names or None!r}")
    notes: tuple[str, ...] = ()
    if len(set(names)) > 1:
        notes = (f"dataset_kwargs and net_kwargs name different normalizations {names}; {names[0]!r} is used",)
    if "im_size" in inference:
        size = _integer(inference, "im_size", where="inference_kwargs")
    elif "image_size" in dataset:
        size = _integer(dataset, "image_size", where="dataset_kwargs")
    else:
        size = min(_image_size(net))
    return {"do_resize": True, "size": {"shortest_edge": size}, **NORMALIZATIONS[names[0]]}, notes


def _image_size(net: Mapping[str, Any]) -> tuple[int, int]:
    value = net.get("image_size")
    size = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else ()
    patch_size = _integer(net, "patch_size")
    if len(size) != 2 or not all(type(side) is int and side > 0 and side % patch_size == 0 for side in size):
        raise CheckpointError(
            f"variant.yml: net_kwargs.image_size must be (height, width), multiples of patch_size={patch_size}, "
            f"got {value!r}"
        )
    return size[0], size[1]


def _section(parent: Mapping[str, Any], key: str, where: str = "", default: Any = None) -> Mapping[str, Any]:
    value = parent.get(key, default)
    if not isinstance(value, Mapping):
        name = f"{where}.{key}" if where else key
        raise CheckpointError(f"variant.yml: {name} must be a mapping, got {value!r}")
    return value


def _integer(section: Mapping[str, Any], key: str, where: str = "net_kwargs", default: int | None = None) -> int:
    value = section.get(key, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"variant.yml: {where}.{key} must be a whole number above 0, got {value!r}")
    return value


def _number(section: Mapping[str, Any], key: str, default: float, where: str = "net_kwargs") -> float:
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise CheckpointError(f"variant.yml: {where}.{key} must be a number from 0 to below 1, got {value!r}")
    return float(value)


def _flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    value = section.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"variant.yml: net_kwargs.{key} must be true or false, got {value!r}")
    return value


RECIPE = Recipe(
    title="official Segmenter",
    url="https://github.com/rstrudel/segmenter",
    citation=CITATION,
    read=read_segmenter,
    plan=plan_segmenter,
)
