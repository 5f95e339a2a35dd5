"""The recipe for mmsegmentation: Segmenter, and SETR with its naive or PUP head, on its `VisionTransformer`.

mmsegmentation (https://github.com/open-mmlab/mmsegmentation). Facts of its code (0.30 to 1.2) kept here:

- the backbone's LayerNorm eps is in its config (1e-6 in the published ones), that of the mask head is 1e-5, that of
  SETR's head 1e-6;
- positions are resized with the config's `interpolate_mode`, without antialiasing, only when the token count differs;
- images are padded to whole patches; the logits are resized from the padded grid straight to the image's size;
- the patch projection may have no bias: the tensors tell, not the config;
- the head looks at one of the layers that `out_indices` names, the one that `in_index` selects;
- images are normalised on the 0 to 255 scale, in blue, green, red or turned around (see `openmmlab.py`).

The settings are those stored in the checkpoint, else those of a `.py` config beside it; neither is executed.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...utils.errors import CheckpointError
from ..reading.python_config import parse_config, python_configs
from ..reading.settings import Settings
from ..reading.sources import choose_entry, find_weights, license_of, read_tensors, tensors_of
from ..recipe import Plan, Recipe, Sign, SourceCheckpoint
from ..references.mmseg import MmsegForward
from ..rules import BATCH_NORM, PARAM, Drop, Flatten, Rename, Rule, SplitRows
from .openmmlab import count_channels, head_settings, label_settings, read_pictures, window_settings
from .timm_style import count_blocks

__all__ = ["RECIPE", "mmseg_rules", "plan_mmseg", "read_mmseg"]

HEADS = {
    "SegmenterMaskTransformerHead": "mask_transformer",
    "FCNHead": "linear",
    "SETRUPHead": "progressive_upsampling",
}
INTERPOLATIONS = ("bicubic", "bilinear")
# arguments of the constructor that change what is computed, with the value that can be ported
BACKBONE_FLAGS = {
    "with_cls_token": True,
    "patch_norm": False,
    "pre_norm": False,
    "qkv_bias": True,
    "out_origin": False,
    "output_cls_token": False,
}
# defaults of mmsegmentation's constructors, which configs leave out
SETR_NORM = {"type": "LN", "eps": 1e-6}
DEFAULT_EPS = 1e-5  # of `dict(type="LN")`, and of BatchNorm

CITATION = """@misc{mmseg2020,
  title  = {{MMSegmentation}: OpenMMLab Semantic Segmentation Toolbox and Benchmark},
  author = {MMSegmentation Contributors},
  year   = {2020},
  note   = {https://github.com/open-mmlab/mmsegmentation}
}"""


def _block_rules(block: str, layer: str) -> tuple[Rule, ...]:
    """The rules of one stack of transformer layers, the same in backbone and head."""
    qkv = tuple(f"{layer}.attention.{name}_proj.{{param}}" for name in "qkv")
    return (
        Rename(f"{block}.ln1.{PARAM}", f"{layer}.layernorm_before.{{param}}"),
        SplitRows(f"{block}.attn.attn.in_proj_{PARAM}", qkv),
        Rename(f"{block}.attn.attn.out_proj.{PARAM}", f"{layer}.attention.o_proj.{{param}}"),
        Rename(f"{block}.ln2.{PARAM}", f"{layer}.layernorm_after.{{param}}"),
        Rename(f"{block}.ffn.layers.0.0.{PARAM}", f"{layer}.mlp.fc1.{{param}}"),
        Rename(f"{block}.ffn.layers.1.{PARAM}", f"{layer}.mlp.fc2.{{param}}"),
    )


BACKBONE_RULES: tuple[Rule, ...] = (
    Rename("backbone.cls_token", "ailurus.embeddings.cls_token"),
    Rename("backbone.pos_embed", "ailurus.embeddings.position_embeddings"),
    Rename(f"backbone.patch_embed.projection.{PARAM}", "ailurus.embeddings.patch_embeddings.projection.{param}"),
    *_block_rules("backbone.layers.{layer}", "ailurus.layers.{layer}"),
)
FINAL_NORM_RULES: tuple[Rule, ...] = (Rename(f"backbone.ln1.{PARAM}", "ailurus.layernorm.{param}"),)
HEAD_RULES: Mapping[str, tuple[Rule, ...]] = {
    "linear": (
        Flatten("decode_head.conv_seg.weight", "decode_head.classifier.weight"),
        Rename("decode_head.conv_seg.bias", "decode_head.classifier.bias"),
    ),
    "mask_transformer": (
        Rename("decode_head.cls_emb", "decode_head.class_tokens"),
        Rename(f"decode_head.dec_proj.{PARAM}", "decode_head.projection.{param}"),
        *_block_rules("decode_head.layers.{layer}", "decode_head.layers.{layer}"),
        Rename(f"decode_head.decoder_norm.{PARAM}", "decode_head.layernorm.{param}"),
        Rename("decode_head.patch_proj.weight", "decode_head.patch_projection.weight"),
        Rename("decode_head.classes_proj.weight", "decode_head.class_projection.weight"),
        Rename(f"decode_head.mask_norm.{PARAM}", "decode_head.mask_norm.{param}"),
        Drop(f"decode_head.conv_seg.{PARAM}", "a classifier that the mask head does not use", optional=True),
    ),
    "progressive_upsampling": (
        Rename(f"decode_head.norm.{PARAM}", "decode_head.layernorm.{param}"),
        Rename("decode_head.up_convs.{layer}.0.conv.weight", "decode_head.convolutions.{layer}.weight"),
        Rename(
            f"decode_head.up_convs.{{layer}}.0.bn.{BATCH_NORM}",
            "decode_head.batch_norms.{layer}.{param}",
        ),
        Rename(f"decode_head.conv_seg.{PARAM}", "decode_head.classifier.{param}"),
    ),
}


def mmseg_rules(decoder_type: str, final_norm: bool) -> tuple[Rule, ...]:
    """The whole table for a head of this `decoder_type`."""
    auxiliary = Drop("auxiliary_head.{rest:*}", "an auxiliary head, used only in training", optional=True)
    return BACKBONE_RULES + (FINAL_NORM_RULES if final_norm else ()) + HEAD_RULES[decoder_type] + (auxiliary,)


def read_mmseg(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read a checkpoint and its config, from inside the file or from the one `.py` beside it.

    Raises:
        CheckpointError: a file is unreadable or unsafe, or holds no state dict or no config.
    """
    content = read_tensors(weights, objects=True)
    entry, notes = choose_entry(content, weights, ("state_dict",), entry)
    tensors = tensors_of(content, weights, entry)
    texts, labels = python_configs(content)
    texts = {f"{weights}, {place}": text for place, text in texts.items()}
    return SourceCheckpoint(weights, tensors, {**_config(texts, weights), "labels": labels}, notes)


def _config(texts: dict[str, str], weights: Path) -> dict[str, Any]:
    beside = sorted(weights.parent.glob("*.py"))
    if len(beside) == 1:
        texts[str(beside[0])] = beside[0].read_text(encoding="utf-8", errors="replace")
    for name, text in texts.items():
        config = parse_config(text, name)
        if isinstance(config.get("model"), dict) and "backbone" in config["model"]:
            return config
    where = ", ".join(texts) or "no config in the checkpoint, no single .py beside it"
    raise CheckpointError(f"{weights}: no config with model = dict(backbone=...) written out was found ({where})")


def plan_mmseg(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the config.

    Raises:
        CheckpointError: the model is not Segmenter or SETR on a `VisionTransformer`, or a setting is missing or not
            supported.
    """
    model = Settings(checkpoint.description, "the config's ").section("model")
    backbone, head = model.section("backbone"), model.section("decode_head")
    _check_kinds(backbone, head)
    config = _backbone_settings(checkpoint, backbone) | _head_settings(head)
    config |= label_settings(checkpoint.description["labels"], config["num_labels"])
    windows, notes = window_settings(model)
    pictures = read_pictures(checkpoint.description, config["num_channels"])
    if pictures is None:
        raise CheckpointError(
            "the config's data_preprocessor or img_norm_cfg must tell mean and standard deviation, got neither"
        )
    config |= windows
    return Plan(
        config=config,
        rules=mmseg_rules(config["decoder_type"], config["use_final_norm"]),
        processor=pictures.processor,
        reference=MmsegForward(config),
        preprocess=pictures.preprocess,
        bgr=pictures.bgr,
        pads_images=True,
        license=license_of(checkpoint.weights_path.parent),
        notes=pictures.notes + notes,
    )


def _check_kinds(backbone: Settings, head: Settings) -> None:
    backbone.choice("type", ("VisionTransformer",))
    for name, expected in BACKBONE_FLAGS.items():
        backbone.choice(name, (expected,), expected)
    kind = head.choice("type", HEADS)
    if kind == "FCNHead":  # without convolutions it is the linear head
        head.choice("num_convs", (0,), 2)
        head.choice("concat_input", (False,), True)
    if kind == "SETRUPHead":
        _check_upsampling(head)
    _check_last_layer(backbone, head)
    head.choice("align_corners", (False,), False)


def _check_upsampling(head: Settings) -> None:
    """What SETR's head could have and the published ones do not: other norms, activations and kernels."""
    for name, kind in (("norm_layer", "LN"), ("act_cfg", "ReLU")):
        if name in head.values:
            head.section(name).choice("type", (kind,))
    norm = head.section("norm_cfg")
    norm.choice("type", ("BN", "BN2d", "SyncBN"))
    norm.choice("eps", (DEFAULT_EPS,), DEFAULT_EPS)
    head.choice("kernel_size", (1, 3), 3)


def _check_last_layer(backbone: Settings, head: Settings) -> None:
    """The head must look at the last layer: `in_index` selects one of the outputs, which come in the layers' order."""
    last = backbone.integer("num_layers", 12) - 1
    named, selected = backbone.values.get("out_indices", -1), head.values.get("in_index", -1)
    layers = named if isinstance(named, list | tuple) else [last if named == -1 else named]
    if not all(type(index) is int and 0 <= index <= last for index in layers) or last not in layers:
        raise CheckpointError(f"model.backbone.out_indices must name the last layer, {last}, got {named!r}")
    if type(selected) is not int or selected not in (-1, len(set(layers)) - 1):
        raise CheckpointError(
            f"model.decode_head.in_index must select the last layer of out_indices {named!r}, got {selected!r}"
        )


def _backbone_settings(checkpoint: SourceCheckpoint, backbone: Settings) -> dict[str, Any]:
    hidden_size = backbone.integer("embed_dims", 768)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(checkpoint.tensors, "backbone.layers.{layer}"),
        "num_attention_heads": backbone.integer("num_heads", 12),
        "intermediate_size": backbone.integer("mlp_ratio", 4) * hidden_size,
        "layer_norm_eps": _eps(backbone.values.get("norm_cfg")),
        "image_size": backbone.pair("img_size", 224),
        "patch_size": backbone.integer("patch_size", 16),
        "num_channels": backbone.integer("in_channels", 3),
        "patch_bias": "backbone.patch_embed.projection.bias" in checkpoint.tensors,
        "use_final_norm": "backbone.ln1.weight" in checkpoint.tensors,
        "hidden_dropout_prob": backbone.share("drop_rate", 0.0),
        "attention_probs_dropout_prob": backbone.share("attn_drop_rate", 0.0),
        "drop_path_rate": backbone.share("drop_path_rate", 0.0),
        "position_interpolation": backbone.choice("interpolate_mode", INTERPOLATIONS, "bicubic"),
        "position_resize_rule": "count",
        "logits_resize": "squeeze",
    }


def _head_settings(head: Settings) -> dict[str, Any]:
    kind = head.values["type"]
    masks = kind == "SegmenterMaskTransformerHead"  # one mask for each class, whatever out_channels says
    num_labels = head.integer("num_classes") if masks else count_channels(head)
    settings = {"decoder_type": HEADS[kind], "num_labels": num_labels, **head_settings(head, num_labels)}
    if kind == "FCNHead":
        return settings
    if kind == "SETRUPHead":
        return settings | {
            "decoder_num_layers": head.integer("num_convs", 1),
            "decoder_hidden_size": head.integer("channels"),
            "decoder_kernel_size": head.integer("kernel_size", 3),
            "decoder_upscale": head.integer("up_scale", 4),
            "decoder_layer_norm_eps": _eps(head.values.get("norm_layer", SETR_NORM)),
            "decoder_dropout_prob": head.share("dropout_ratio", 0.1),
        }
    embed_dims = head.integer("embed_dims", 768)
    return settings | {
        "decoder_hidden_size": embed_dims,
        "decoder_num_layers": head.integer("num_layers"),
        "decoder_num_attention_heads": head.integer("num_heads"),
        "decoder_intermediate_size": head.integer("mlp_ratio", 4) * embed_dims,
        "decoder_layer_norm_eps": _eps(head.values.get("norm_cfg")),
        "decoder_dropout_prob": head.share("drop_rate", 0.0),
    }


def _eps(norm: Any) -> float:
    eps = norm.get("eps", DEFAULT_EPS) if isinstance(norm, Mapping) and norm.get("type", "LN") == "LN" else DEFAULT_EPS
    return float(eps)


RECIPE = Recipe(
    title="mmsegmentation",
    url="https://github.com/open-mmlab/mmsegmentation",
    citation=CITATION,
    signs=(
        Sign(
            "tensors named backbone.layers.0.attn.attn.in_proj_weight and decode_head.*",
            lambda e: e.has(r"backbone\.layers\.\d+\.attn\.attn\.in_proj_weight") and e.has(r"decode_head\."),
        ),
    ),
    read=read_mmseg,
    plan=plan_mmseg,
    find=partial(find_weights, preferred=("latest.pth",), hub=False),
    relatives=("segformer",),
)
