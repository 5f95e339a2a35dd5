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
from ..reading.files import read_yaml, state_dict_of
from ..reading.settings import Settings
from ..reading.sources import choose_entry, find_weights, read_tensors
from ..recipe import Pictures, Plan, Recipe, Sign, SourceCheckpoint
from ..references.pictures import Preprocessing
from ..references.segmenter import SegmenterForward
from ..rules import PARAM, Drop, Rename, Rule, Transpose
from .timm_style import IMAGENET, block_rules

__all__ = ["RECIPE", "plan_segmenter", "read_segmenter", "segmenter_rules"]

NORMALIZATIONS = {
    "vit": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "deit": IMAGENET,
}
DECODER_HEAD_DIM = 64

CITATION = """@inproceedings{strudel2021segmenter,
  title     = {Segmenter: Transformer for Semantic Segmentation},
  author    = {Strudel, Robin and Garcia, Ricardo and Laptev, Ivan and Schmid, Cordelia},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}"""


def _unused(name: str, what: str) -> Rule:
    return Drop(f"encoder.{name}.{PARAM}", f"the encoder's ImageNet {what}, unused by Segmenter", optional=True)


ENCODER_RULES: tuple[Rule, ...] = (
    Rename("encoder.cls_token", "ailurus.embeddings.cls_token"),
    Rename("encoder.pos_embed", "ailurus.embeddings.position_embeddings"),
    Rename(f"encoder.patch_embed.proj.{PARAM}", "ailurus.embeddings.patch_embeddings.projection.{param}"),
    *block_rules("encoder.blocks.{layer}", "ailurus.layers.{layer}"),
    Rename(f"encoder.norm.{PARAM}", "ailurus.layernorm.{param}"),
    _unused("head", "classifier"),
)
DISTILLED_RULES: tuple[Rule, ...] = (
    Rename("encoder.dist_token", "ailurus.embeddings.distillation_token"),
    _unused("head_dist", "distillation classifier"),
)
DECODER_RULES: Mapping[str, tuple[Rule, ...]] = {
    "linear": (Rename(f"decoder.head.{PARAM}", "decode_head.classifier.{param}"),),
    "mask_transformer": (
        Rename("decoder.cls_emb", "decode_head.class_tokens"),
        Rename(f"decoder.proj_dec.{PARAM}", "decode_head.projection.{param}"),
        *block_rules("decoder.blocks.{layer}", "decode_head.layers.{layer}"),
        Rename(f"decoder.decoder_norm.{PARAM}", "decode_head.layernorm.{param}"),
        Transpose("decoder.proj_patch", "decode_head.patch_projection.weight"),
        Transpose("decoder.proj_classes", "decode_head.class_projection.weight"),
        Rename(f"decoder.mask_norm.{PARAM}", "decode_head.mask_norm.{param}"),
    ),
}


def segmenter_rules(decoder_type: str, distilled: bool) -> tuple[Rule, ...]:
    """The whole table for a `"linear"` or `"mask_transformer"` decoder on a ViT or a distilled DeiT encoder."""
    return ENCODER_RULES + (DISTILLED_RULES if distilled else ()) + DECODER_RULES[decoder_type]


def read_segmenter(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read a checkpoint and the `variant.yml` beside it.

    Raises:
        FileNotFoundError: `variant.yml` is missing.
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    content = read_tensors(weights)
    entry, notes = choose_entry(content, weights, ("model",), entry)
    tensors = state_dict_of(content, weights, entry)
    variant = weights.parent / "variant.yml"
    if not variant.is_file():
        raise FileNotFoundError(
            f"no variant.yml beside {weights}: official Segmenter checkpoints keep their settings there"
        )
    return SourceCheckpoint(weights, tensors, read_yaml(variant), notes)


def plan_segmenter(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from `variant.yml`.

    Raises:
        CheckpointError: a setting is missing, of the wrong type, or not supported.
    """
    variant = Settings(checkpoint.description, "variant.yml: ")
    net = variant.section("net_kwargs")
    config = _encoder_config(net) | _decoder_config(net.section("decoder"), net)
    config |= _window_config(variant)
    pictures = _pictures(variant, net)
    rules = segmenter_rules(config["decoder_type"], config["use_distillation_token"])
    reference = SegmenterForward(config)
    return Plan(
        config=config,
        rules=rules,
        processor=pictures.processor,
        reference=reference,
        preprocess=pictures.preprocess,
        pads_images=True,
        notes=pictures.notes,
    )


def _encoder_config(net: Settings) -> dict[str, Any]:
    hidden_size = net.integer("d_model")
    dropout = net.share("dropout", default=0.1)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": net.integer("n_layers"),
        "num_attention_heads": net.integer("n_heads"),
        "intermediate_size": 4 * hidden_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "drop_path_rate": net.share("drop_path_rate", default=0.0),
        "layer_norm_eps": 1e-5,
        "image_size": _image_size(net),
        "patch_size": net.integer("patch_size"),
        "num_channels": net.integer("channels", default=3),
        "num_labels": _num_labels(net),
        "use_distillation_token": net.flag("distilled", default=False),
        "position_interpolation": "bilinear",
        "position_resize_rule": "count",
    }


def _num_labels(net: Settings) -> int:
    number = net.integer("n_cls")
    if number == 1:  # the original takes the largest of the classes' logits
        raise CheckpointError(f"{net.where}n_cls must be at least 2, got 1: of one class every pixel is of that class")
    return number


def _decoder_config(decoder: Settings, net: Settings) -> dict[str, Any]:
    name = decoder.values.get("name")
    if isinstance(name, str) and "linear" in name:  # the original tests it in this way
        return {"decoder_type": "linear"}
    if name != "mask_transformer":
        raise CheckpointError(f"{decoder.where}name must be 'linear' or 'mask_transformer', got {name!r}")
    hidden_size = net.integer("d_model")
    if hidden_size < DECODER_HEAD_DIM:
        raise CheckpointError(
            f"{net.where}d_model must be at least {DECODER_HEAD_DIM} for a mask_transformer decoder "
            f"(one head per {DECODER_HEAD_DIM} channels), got {hidden_size}"
        )
    return {
        "decoder_type": "mask_transformer",
        "decoder_num_layers": decoder.integer("n_layers"),
        "decoder_num_attention_heads": hidden_size // DECODER_HEAD_DIM,
        "decoder_intermediate_size": 4 * hidden_size,
        "decoder_dropout_prob": decoder.share("dropout", default=0.1),
    }


def _window_config(variant: Settings) -> dict[str, int]:
    """Size and stride of the sliding windows, in pixels, where the variant has them."""
    inference = variant.section("inference_kwargs", default={})
    return {name: inference.integer(name) for name in ("window_size", "window_stride") if name in inference.values}


def _pictures(variant: Settings, net: Settings) -> Pictures:
    """Preprocessing as in the original evaluation: the shorter side resized to `im_size`, then normalised.

    Without `inference_kwargs.im_size` the size is the training images' (`dataset_kwargs.image_size`), else the
    encoder's. The original limits the longer side too, by a ratio that depends on the data set and is not stored; it is
    left out.

    Where both places name a normalisation, the dataset's is used: it is what the weights were trained with.
    """
    dataset = variant.section("dataset_kwargs", default={})
    inference = variant.section("inference_kwargs", default={})
    named = [section for section in (dataset, net) if "normalization" in section.values] or [net]
    names = [section.choice("normalization", NORMALIZATIONS) for section in named]
    notes: tuple[str, ...] = ()
    if len(set(names)) > 1:
        notes = (f"dataset_kwargs and net_kwargs name different normalizations {names}; {names[0]!r} is used",)
    if "im_size" in inference.values:
        size = inference.integer("im_size")
    elif "image_size" in dataset.values:
        size = dataset.integer("image_size")
    else:
        size = min(_image_size(net))
    processor = {"do_resize": True, "size": {"shortest_edge": size}, **NORMALIZATIONS[names[0]]}
    preprocess = Preprocessing(processor["image_mean"], processor["image_std"], shortest_edge=size)
    return Pictures(processor, preprocess=preprocess, notes=notes)


def _image_size(net: Settings) -> tuple[int, int]:
    height, width = net.pair("image_size")
    patch_size = net.integer("patch_size")
    if height % patch_size or width % patch_size:
        raise CheckpointError(
            f"{net.where}image_size must be (height, width), multiples of patch_size={patch_size}, "
            f"got {net.values['image_size']!r}"
        )
    return height, width


RECIPE = Recipe(
    title="official Segmenter",
    url="https://github.com/rstrudel/segmenter",
    citation=CITATION,
    signs=(
        Sign(
            "tensors named encoder.blocks.0.attn.qkv.weight and decoder.*",
            lambda e: e.has(r"encoder\.blocks\.\d+\.attn\.qkv\.") and e.has(r"decoder\."),
        ),
    ),
    read=read_segmenter,
    plan=plan_segmenter,
    find=partial(find_weights, preferred=("checkpoint.pth", "model.safetensors"), hub=False),
)
