"""The recipe for SegFormer checkpoints of three origins, told apart by their tensor names.

SegFormer: Xie et al., NeurIPS 2021, arXiv 2105.15203. Facts of the original codes kept here:

| | transformers | NVlabs | mmsegmentation |
|---|---|---|---|
| LayerNorm eps | 1e-5 everywhere | 1e-6, but 1e-5 after patch embedding and key reduction | 1e-6 everywhere |
| keys and values | two matrices | one, rows k, v | one with the queries, rows q, k, v |
| level of the head | linear with bias | linear with bias | linear without bias, batch norm, ReLU |
| fusion reads | last stage first | last stage first | first stage first |
| classifier | `classifier` | `linear_pred`; `conv_seg` is unused | `conv_seg` |

Sizes come from the tensors themselves. The number of attention heads, how pictures are prepared, windows, dropout and
what the loss leaves out are not in them: they come from the settings stored with the weights (which are parsed, never
run). Where those say nothing, heads are those of all published models, (1, 2, 5, 8), and pictures are normalised as
theirs, in red, green, blue.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ...modeling.modeling_ailurus_segformer import AiluRusSegformerForSemanticSegmentation
from ...utils.errors import CheckpointError
from ..reading.files import state_dict_of
from ..reading.python_config import parse_config, python_configs
from ..reading.settings import Settings, config_of
from ..reading.sources import choose_entry, license_of, read_json_beside, read_tensors
from ..recipe import Evidence, Pictures, Plan, Recipe, Reference, Sign, SourceCheckpoint, cluster_layer_of
from ..references.pictures import Preprocessing
from ..references.segformer import SegformerForward
from ..rules import BATCH_NORM, PARAM, Drop, Flatten, Rename, Rule, SplitRows, fill, match, renames
from .native_processor import native_pictures
from .openmmlab import head_settings, label_settings, read_pictures, window_settings
from .timm_style import IMAGENET

__all__ = ["ORIGINS", "RECIPE", "RULES", "plan_segformer", "read_segformer"]

CITATION = """@inproceedings{xie2021segformer,
  title={SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers},
  author={Xie, Enze and Wang, Wenhai and Yu, Zhiding and Anandkumar, Anima and Alvarez, Jose M. and Luo, Ping},
  booktitle={NeurIPS},
  year={2021}
}"""
STAGES = range(4)
PUBLISHED_HEADS = (1, 2, 5, 8)  # of MiT-B0 to B5
STRIDES = (4, 2, 2, 2)  # of all of them, and of the original codes without settings
NATIVE_SETTINGS = (
    "strides",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "classifier_dropout_prob",
    "initializer_range",
    "semantic_loss_ignore_index",
)  # of transformers' configuration, kept under the same names
# A tensor name that only checkpoints of this origin have.
ORIGINS = {
    "transformers": "segformer.stages.0.patch_embeddings.proj.weight",
    "transformers 4": "segformer.encoder.patch_embeddings.0.proj.weight",
    "nvlabs": "backbone.patch_embed1.proj.weight",
    "mmseg": "backbone.layers.0.0.projection.weight",
}
EPS: Mapping[str, dict[str, float]] = {
    "transformers": {"layer_norm_eps": 1e-5},
    "transformers 4": {"layer_norm_eps": 1e-5},
    "nvlabs": {"layer_norm_eps": 1e-6, "patch_norm_eps": 1e-5, "reduction_norm_eps": 1e-5},
    "mmseg": {"layer_norm_eps": 1e-6},
}


# what our names begin with
STAGE = "segformer.stages.{stage}."
BLOCK = f"{STAGE}blocks.{{block}}."
LEVEL = "decode_head.linear_projections.{stage}."


def _reduction_rules(source: str, target: str, conv: str = "attn.sr", norm: str = "attn.norm") -> tuple[Rule, ...]:
    reduction = "attention.sequence_reduction."
    names = {conv: f"{reduction}sequence_reduction", norm: f"{reduction}layer_norm"}
    return renames(names, source, target, optional=True)  # stages that reduce nothing have none


def _block_rules(source: str, target: str, names: Mapping[str, str], fused: str, parts: str) -> Iterator[Rule]:
    """The rules of a block of NVlabs or mmsegmentation, where one matrix, `fused`, holds several projections."""
    yield from renames({"norm1": "layernorm_before", "norm2": "layernorm_after", **names}, source, target)
    yield SplitRows(f"{source}{fused}{PARAM}", tuple(f"{target}attention.{part}_proj.{{param}}" for part in parts))
    yield from _reduction_rules(source, target)


def _fusion_rules(conv: str, norm: str, classifier: str) -> Iterator[Rule]:
    yield Rename(f"decode_head.{conv}.weight", "decode_head.linear_fuse.weight")
    yield Rename(f"decode_head.{norm}.{BATCH_NORM}", "decode_head.batch_norm.{param}")
    yield Rename(f"decode_head.{classifier}.{PARAM}", "decode_head.classifier.{param}")


def _transformers_4_rules() -> Iterator[Rule]:
    block = "segformer.encoder.block.{stage}.{block}."
    names = {
        "layer_norm_1": "layernorm_before",
        "attention.self.query": "attention.q_proj",
        "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "layer_norm_2": "layernorm_after",
        "mlp.dense1": "mlp.fc1",
        "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
        "mlp.dense2": "mlp.fc2",
    }
    yield from renames(names, block, BLOCK)
    yield from _reduction_rules(block, BLOCK, "attention.self.sr", "attention.self.layer_norm")
    yield Rename("segformer.encoder.patch_embeddings.{stage}.{rest:*}", f"{STAGE}patch_embeddings.{{rest}}")
    yield from renames({"segformer.encoder.layer_norm.{stage}": f"{STAGE}layer_norm"})
    yield from renames({"decode_head.linear_c.{stage}.proj": f"{LEVEL}proj"})
    yield from _fusion_rules("linear_fuse", "batch_norm", "classifier")


def _nvlabs_rules() -> Iterator[Rule]:
    for stage in STAGES:
        number, target = stage + 1, f"segformer.stages.{stage}."
        block, our_block = f"backbone.block{number}.{{block}}.", f"{target}blocks.{{block}}."
        names = {"attn.q": "attention.q_proj", "attn.proj": "attention.o_proj"}
        names |= {"mlp.{name:fc1|dwconv.dwconv|fc2}": "mlp.{name}"}
        yield from _block_rules(block, our_block, names, "attn.kv.", "kv")
        yield from renames(
            {
                f"backbone.patch_embed{number}.proj": f"{target}patch_embeddings.proj",
                f"backbone.patch_embed{number}.norm": f"{target}patch_embeddings.layer_norm",
                f"backbone.norm{number}": f"{target}layer_norm",
                f"decode_head.linear_c{number}.proj": f"decode_head.linear_projections.{stage}.proj",
            }
        )
    yield from _fusion_rules("linear_fuse.conv", "linear_fuse.bn", "linear_pred")
    yield Drop(f"decode_head.conv_seg.{PARAM}", "a classifier that NVlabs' SegFormer head never uses", optional=True)


def _mmseg_rules() -> Iterator[Rule]:
    stage, block = "backbone.layers.{stage}.", "backbone.layers.{stage}.1.{block}."
    names = {"attn.attn.out_proj": "attention.o_proj", "ffn.layers.1": "mlp.dwconv.dwconv"}
    yield from _block_rules(block, BLOCK, names, "attn.attn.in_proj_", "qkv")
    for number, name in ((0, "fc1"), (4, "fc2")):
        yield Flatten(f"{block}ffn.layers.{number}.weight", f"{BLOCK}mlp.{name}.weight")
        yield Rename(f"{block}ffn.layers.{number}.bias", f"{BLOCK}mlp.{name}.bias")
    names = {"0.projection": "patch_embeddings.proj", "0.norm": "patch_embeddings.layer_norm", "2": "layer_norm"}
    yield from renames(names, stage, STAGE)
    yield Flatten("decode_head.convs.{stage}.conv.weight", f"{LEVEL}proj.weight")
    yield Rename(f"decode_head.convs.{{stage}}.bn.{BATCH_NORM}", f"{LEVEL}batch_norm.{{param}}")
    yield from _fusion_rules("fusion_conv.conv", "fusion_conv.bn", "conv_seg")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "transformers": (
        Rename("segformer.{rest:*}", "segformer.{rest}"),
        Rename("decode_head.{rest:*}", "decode_head.{rest}"),
    ),
    "transformers 4": tuple(_transformers_4_rules()),
    "nvlabs": tuple(_nvlabs_rules()),
    "mmseg": tuple(_mmseg_rules()),
}


def read_segformer(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read a checkpoint and the settings in it or beside it.

    Raises:
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    content = read_tensors(weights, objects=True)
    entry, notes = choose_entry(content, weights, ("state_dict",), entry)
    tensors = state_dict_of(content, weights, entry)
    texts, labels = python_configs(content)
    beside = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(weights.parent.glob("*.py"))]
    settings = {"config.json": read_json_beside(weights), "python": [*texts.values(), *beside]}
    return SourceCheckpoint(weights, tensors, {**settings, "labels": labels}, notes)


def plan_segformer(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors, and from the settings where tensors do not tell.

    Raises:
        CheckpointError: the tensors are not those of a SegFormer with a segmentation head.
    """
    origin = next((name for name, key in ORIGINS.items() if key in checkpoint.tensors), None)
    if origin is None:
        raise CheckpointError(
            f"{checkpoint.weights_path} is no SegFormer of transformers, NVlabs or mmsegmentation: it holds none of "
            f"{', '.join(ORIGINS.values())}"
        )
    rules = RULES[origin]
    # the table turns every origin's names into ours, so that sizes are read in one way
    config = _sizes(rules, checkpoint)
    heads, notes = _heads(checkpoint)
    config |= {"num_attention_heads": heads, **EPS[origin], "decoder_type": "conv" if origin == "mmseg" else "linear"}
    native = _native_config(checkpoint, heads)
    python = {**_python_settings(checkpoint), "labels": checkpoint.description["labels"]}
    config |= _training_settings(native, python, config["num_labels"]) | label_settings(
        {**python["labels"], **_native_names(checkpoint.description, config["num_labels"])}, config["num_labels"]
    )
    model = Settings(python, "the config's ").section("model", default={})
    windows, window_notes = window_settings(model)
    config |= windows
    pictures = _pictures(checkpoint, python, origin, config["num_channels"])
    # counted in each stage, so the shallowest decides
    tail = checkpoint.overrides.get("tail_layers", 0)
    config["cluster_layer"] = cluster_layer_of(min(config["depths"]) - tail, checkpoint.overrides)
    return Plan(
        config=config,
        rules=rules,
        processor=pictures.processor,
        model_class=AiluRusSegformerForSemanticSegmentation,
        reference=_reference(origin, native, config),
        preprocess=pictures.preprocess,
        bgr=pictures.bgr,
        image_sizes=((64, 96), (50, 75)),
        license=license_of(checkpoint.weights_path.parent),
        notes=notes + window_notes + pictures.notes,
    )


def _native_config(checkpoint: SourceCheckpoint, heads: list[int]) -> SegformerConfig | None:
    """transformers' configuration; `None` where its `config.json` is not there."""
    settings = checkpoint.description["config.json"]
    if settings.get("model_type") != "segformer":
        return None
    return config_of(SegformerConfig, {**settings, "num_attention_heads": heads}, len(checkpoint.tensors))


def _reference(origin: str, native: SegformerConfig | None, config: Mapping[str, Any]) -> Reference | None:
    if not origin.startswith("transformers"):
        return SegformerForward(config)
    return None if native is None else _native_forward(native)


def _native_forward(native: SegformerConfig) -> Reference:
    """transformers' own class on the same tensors."""

    def forward(tensors: Mapping[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        model = SegformerForSemanticSegmentation.from_pretrained(
            None, config=native, state_dict=dict(tensors), dtype=pixel_values.dtype
        )
        return F.interpolate(model(pixel_values).logits, size=pixel_values.shape[-2:], mode="bilinear")

    return forward


def _sizes(rules: tuple[Rule, ...], checkpoint: SourceCheckpoint) -> dict[str, Any]:
    """The settings that shapes tell."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, tensor in checkpoint.tensors.items():
        for rule in rules:
            if (values := match(rule, key)) is not None:
                shapes |= {fill(target, values): tuple(tensor.shape) for target in rule.targets}
    stage = "segformer.stages.{}.".format
    try:
        patches = [shapes[stage(index) + "patch_embeddings.proj.weight"] for index in STAGES]
        widths = [shapes[stage(index) + "blocks.0.mlp.fc1.bias"][0] for index in STAGES]
        decoder, classes = shapes["decode_head.linear_fuse.weight"][0], shapes["decode_head.classifier.weight"][0]
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.weights_path} is no SegFormer with four stages and a segmentation head: nothing in it gives "
            f"{error}"
        ) from error
    reductions = [f"{stage(i)}blocks.0.attention.sequence_reduction.sequence_reduction.weight" for i in STAGES]
    # not the largest number found: a name may claim block 10**12, and the check against the model finds gaps
    norms = [stage(index) + "blocks.{}.layernorm_before.weight" for index in STAGES]
    depths = [next(depth for depth in count() if norm.format(depth) not in shapes) for norm in norms]
    return {
        "num_channels": patches[0][1],
        "depths": depths,
        "hidden_sizes": [shape[0] for shape in patches],
        "patch_sizes": [shape[-1] for shape in patches],
        "sr_ratios": [shapes[name][-1] if name in shapes else 1 for name in reductions],
        "mlp_ratios": [width / shape[0] for width, shape in zip(widths, patches, strict=True)],
        "decoder_hidden_size": decoder,
        "num_labels": classes,
    }


def _heads(checkpoint: SourceCheckpoint) -> tuple[list[int], tuple[str, ...]]:
    """Attention heads of the stages, and a note where they are a guess."""
    if "num_attention_heads" in checkpoint.overrides:
        return list(checkpoint.overrides["num_attention_heads"]), ()
    native = checkpoint.description["config.json"].get("num_attention_heads")
    texts = checkpoint.description["python"]
    for heads in [native, *(value for text in texts for value in _values_in_python(text, "num_heads"))]:
        if isinstance(heads, list | tuple) and len(heads) == len(STAGES) and all(type(head) is int for head in heads):
            return list(heads), ()
    note = f"no setting tells the numbers of attention heads; those of all published models are used: {PUBLISHED_HEADS}"
    return list(PUBLISHED_HEADS), (note,)


def _values_in_python(text: str, name: str) -> Iterator[Any]:
    """Plain values given to `name` in the calls and dictionaries of a Python text; nothing of it is run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg == name]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == name]
        for value in values:
            with suppress(ValueError, TypeError, SyntaxError, RecursionError):
                yield ast.literal_eval(value)


def _native_names(description: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """The class names of transformers' config, in order, where it has some."""
    stored = description["config.json"].get("id2label")
    if not isinstance(stored, Mapping):
        return {}
    return {"classes": [stored.get(str(index)) for index in range(num_labels)]}


def _python_settings(checkpoint: SourceCheckpoint) -> dict[str, Any]:
    """The assignments of the first config of OpenMMLab's tools that has some of those read here; else nothing."""
    for text in checkpoint.description["python"]:
        with suppress(CheckpointError):  # any .py may lie beside the weights
            config = parse_config(text, "config")
            if any(isinstance(config.get(name), Mapping) for name in ("model", "data_preprocessor", "img_norm_cfg")):
                return config
    return {}


def _training_settings(native: SegformerConfig | None, python: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """Dropout, strides, what the loss leaves out, and the threshold of one channel."""
    if native is not None:
        return {name: getattr(native, name) for name in NATIVE_SETTINGS}
    model = Settings(python, "the config's ").section("model", default={})
    backbone, head = model.section("backbone", default={}), model.section("decode_head", default={})
    head.choice("align_corners", (False,), False)
    strides = backbone.values.get("strides", STRIDES)
    return {
        "strides": list(strides) if isinstance(strides, list | tuple) else strides,
        "hidden_dropout_prob": backbone.share("drop_rate", 0.0),
        "attention_probs_dropout_prob": backbone.share("attn_drop_rate", 0.0),
        "drop_path_rate": backbone.share("drop_path_rate", 0.1),
        "classifier_dropout_prob": head.share("dropout_ratio", 0.1),
        **head_settings(head, num_labels),
    }


def _pictures(checkpoint: SourceCheckpoint, python: Mapping[str, Any], origin: str, num_channels: int) -> Pictures:
    """How pictures are prepared; as all published models have it where no setting tells."""
    published = Pictures(IMAGENET, preprocess=Preprocessing(IMAGENET["image_mean"], IMAGENET["image_std"]))
    if (stored := native_pictures(checkpoint.weights_path, "segformer")) is not None:
        return stored
    if origin.startswith("transformers"):
        return published
    if (read := read_pictures(python, num_channels)) is not None:
        return read
    note = (
        "no setting tells how pictures are prepared; they are normalised as for all published models, with ImageNet's "
        "mean and standard deviation, in red, green, blue"
    )
    return replace(published, notes=(note,))


RECIPE = Recipe(
    title="SegFormer",
    url="https://github.com/NVlabs/SegFormer",
    citation=CITATION,
    signs=tuple(
        Sign(f"a tensor named {key}", partial(Evidence.has, pattern=re.escape(key) + "$")) for key in ORIGINS.values()
    ),
    read=read_segformer,
    plan=plan_segformer,
    relatives=("ailurus",),
)
