"""The recipe for SegFormer checkpoints of three origins, told apart by their tensor names.

SegFormer: Xie et al., NeurIPS 2021, arXiv 2105.15203. Facts of the original codes kept here:

| | transformers | NVlabs | mmsegmentation |
|---|---|---|---|
| LayerNorm eps | 1e-5 everywhere | 1e-6, but 1e-5 after patch embedding and key reduction | 1e-6 everywhere |
| keys and values | two matrices | one, rows k, v | one with the queries, rows q, k, v |
| level of the head | linear with bias | linear with bias | linear without bias, batch norm, ReLU |
| fusion reads | last stage first | last stage first | first stage first |
| classifier | `classifier` | `linear_pred`; `conv_seg` is unused | `conv_seg` |

Sizes come from the tensors themselves. Only the number of attention heads is not in them: it comes from the settings
stored with the weights (which are parsed, never run), else it is that of all published models, (1, 2, 5, 8).
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ...modeling.modeling_ailurus_segformer import AiluRusSegformerForSemanticSegmentation
from ...utils.errors import CheckpointError
from ..reading.files import state_dict_of, strip_common_prefix
from ..reading.settings import label_names
from ..reading.sources import license_of, read_json, read_tensors
from ..recipe import Evidence, Plan, Recipe, Reference, Sign, SourceCheckpoint
from ..rules import BATCH_NORM, PARAM, Drop, Flatten, Rename, Rule, SplitRows, fill, match

__all__ = ["ORIGINS", "RECIPE", "plan_segformer", "read_segformer", "segformer_rules"]

CITATION = """@inproceedings{xie2021segformer,
  title={SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers},
  author={Xie, Enze and Wang, Wenhai and Yu, Zhiding and Anandkumar, Anima and Alvarez, Jose M. and Luo, Ping},
  booktitle={NeurIPS},
  year={2021}
}"""
STAGES = range(4)
PUBLISHED_HEADS = (1, 2, 5, 8)  # of MiT-B0 to B5
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


def _renames(pairs: Mapping[str, str], source: str = "", target: str = "", optional: bool = False) -> tuple[Rule, ...]:
    """Rules for weight and bias of layers, by the layers' names in source and target."""
    return tuple(Rename(f"{source}{old}.{PARAM}", f"{target}{new}.{{param}}", optional) for old, new in pairs.items())


def _transformers_4_rules() -> Iterator[Rule]:
    old, new = "segformer.encoder.block.{stage}.{block}.", "segformer.stages.{stage}.blocks.{block}."
    yield from _renames(
        {
            "layer_norm_1": "layernorm_before",
            "attention.self.query": "attention.q_proj",
            "attention.self.key": "attention.k_proj",
            "attention.self.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
            "layer_norm_2": "layernorm_after",
            "mlp.dense1": "mlp.fc1",
            "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
            "mlp.dense2": "mlp.fc2",
        },
        old,
        new,
    )
    yield from _reduction_rules(old, new, "attention.self.sr", "attention.self.layer_norm")
    yield Rename(
        "segformer.encoder.patch_embeddings.{stage}.{rest:*}", "segformer.stages.{stage}.patch_embeddings.{rest}"
    )
    yield Rename(f"segformer.encoder.layer_norm.{{stage}}.{PARAM}", "segformer.stages.{stage}.layer_norm.{param}")
    yield Rename(f"decode_head.linear_c.{{stage}}.proj.{PARAM}", "decode_head.linear_projections.{stage}.proj.{param}")
    yield from _renames({"decode_head.classifier": "decode_head.classifier"})
    yield Rename(f"decode_head.batch_norm.{BATCH_NORM}", "decode_head.batch_norm.{param}")
    yield Rename("decode_head.linear_fuse.weight", "decode_head.linear_fuse.weight")


def _nvlabs_rules() -> Iterator[Rule]:
    for stage in STAGES:
        old, new = f"backbone.block{stage + 1}.{{block}}.", f"segformer.stages.{stage}.blocks.{{block}}."
        yield from _renames(
            {
                "norm1": "layernorm_before",
                "attn.q": "attention.q_proj",
                "attn.proj": "attention.o_proj",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.dwconv.dwconv": "mlp.dwconv.dwconv",
                "mlp.fc2": "mlp.fc2",
            },
            old,
            new,
        )
        targets = tuple(f"{new}attention.{name}_proj.{{param}}" for name in "kv")
        yield SplitRows(f"{old}attn.kv.{PARAM}", targets)
        yield from _reduction_rules(old, new)
        stage_names = {f"patch_embed{stage + 1}.proj": "patch_embeddings.proj"}
        stage_names |= {f"patch_embed{stage + 1}.norm": "patch_embeddings.layer_norm", f"norm{stage + 1}": "layer_norm"}
        yield from _renames(stage_names, "backbone.", f"segformer.stages.{stage}.")
        yield from _renames({f"decode_head.linear_c{stage + 1}.proj": f"decode_head.linear_projections.{stage}.proj"})
    yield from _renames({"decode_head.linear_pred": "decode_head.classifier"})
    yield Rename("decode_head.linear_fuse.conv.weight", "decode_head.linear_fuse.weight")
    yield Rename(f"decode_head.linear_fuse.bn.{BATCH_NORM}", "decode_head.batch_norm.{param}")
    yield Drop(f"decode_head.conv_seg.{PARAM}", "a classifier that NVlabs' SegFormer head never uses", optional=True)


def _mmseg_rules() -> Iterator[Rule]:
    for stage in STAGES:
        old, new = f"backbone.layers.{stage}.1.{{block}}.", f"segformer.stages.{stage}.blocks.{{block}}."
        yield from _renames(
            {
                "norm1": "layernorm_before",
                "attn.attn.out_proj": "attention.o_proj",
                "norm2": "layernorm_after",
                "ffn.layers.1": "mlp.dwconv.dwconv",
            },
            old,
            new,
        )
        targets = tuple(f"{new}attention.{name}_proj.{{param}}" for name in "qkv")
        yield SplitRows(f"{old}attn.attn.in_proj_{PARAM}", targets)
        yield from _reduction_rules(old, new)
        for number, name in ((0, "fc1"), (4, "fc2")):
            yield Flatten(f"{old}ffn.layers.{number}.weight", f"{new}mlp.{name}.weight")
            yield Rename(f"{old}ffn.layers.{number}.bias", f"{new}mlp.{name}.bias")
        yield from _renames(
            {"0.projection": "patch_embeddings.proj", "0.norm": "patch_embeddings.layer_norm", "2": "layer_norm"},
            f"backbone.layers.{stage}.",
            f"segformer.stages.{stage}.",
        )
    level = "decode_head.linear_projections.{stage}."
    yield Flatten("decode_head.convs.{stage}.conv.weight", f"{level}proj.weight")
    yield Rename(f"decode_head.convs.{{stage}}.bn.{BATCH_NORM}", f"{level}batch_norm.{{param}}")
    yield Rename("decode_head.fusion_conv.conv.weight", "decode_head.linear_fuse.weight")
    yield Rename(f"decode_head.fusion_conv.bn.{BATCH_NORM}", "decode_head.batch_norm.{param}")
    yield from _renames({"decode_head.conv_seg": "decode_head.classifier"})


def _reduction_rules(old: str, new: str, conv: str = "attn.sr", norm: str = "attn.norm") -> tuple[Rule, ...]:
    reduction = "attention.sequence_reduction."
    names = {conv: f"{reduction}sequence_reduction", norm: f"{reduction}layer_norm"}
    return _renames(names, old, new, optional=True)  # stages that reduce nothing have none


RULES: Mapping[str, tuple[Rule, ...]] = {
    "transformers": (
        Rename("segformer.{rest:*}", "segformer.{rest}"),
        Rename("decode_head.{rest:*}", "decode_head.{rest}"),
    ),
    "transformers 4": tuple(_transformers_4_rules()),
    "nvlabs": tuple(_nvlabs_rules()),
    "mmseg": tuple(_mmseg_rules()),
}


def segformer_rules(origin: str) -> tuple[Rule, ...]:
    """The whole table for one of `ORIGINS`."""
    return RULES[origin]


def read_segformer(weights: Path) -> SourceCheckpoint:
    """Read a checkpoint and the settings in it or beside it.

    Raises:
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    content = read_tensors(weights, objects=True)
    tensors = strip_common_prefix(state_dict_of(content, weights, "state_dict"))
    meta = content.get("meta")
    return SourceCheckpoint(weights, tensors, _description(weights, meta if isinstance(meta, Mapping) else {}))


def _description(weights: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Settings: `config.json` and `preprocessor_config.json`, or the text of a Python config and the class names."""
    found: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        if (path := weights.parent / name).is_file():
            found[name] = read_json(path)
    texts = [meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)]
    texts += [path.read_text(encoding="utf-8", errors="replace") for path in sorted(weights.parent.glob("*.py"))]
    dataset = meta.get("dataset_meta")
    classes = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    return {**found, "python": texts, "classes": classes}


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
    rules = segformer_rules(origin)
    # the table turns every origin's names into ours, so that sizes are read in one way
    config = _sizes(rules, checkpoint)
    heads, notes = _heads(checkpoint)
    config |= {"num_attention_heads": heads, **EPS[origin], "decoder_type": "conv" if origin == "mmseg" else "linear"}
    config |= label_names(_stored_names(checkpoint.description, config["num_labels"]), config["num_labels"])
    # counted in each stage, so the shallowest decides
    tail = checkpoint.overrides.get("tail_layers", 0)
    config["cluster_layer"] = max(0, min(2, min(config["depths"]) - 1 - tail))
    return Plan(
        config=config,
        rules=rules,
        processor=_processor(checkpoint.description),
        model_class=AiluRusSegformerForSemanticSegmentation,
        reference=_native_forward(checkpoint.description.get("config.json"), heads),
        image_sizes=((64, 96), (50, 75)),
        license=license_of(checkpoint.weights_path.parent),
        notes=notes,
    )


def _native_forward(settings: Mapping[str, Any] | None, heads: list[int]) -> Reference | None:
    """transformers' own class on the same tensors; `None` where its `config.json` is not there."""
    if settings is None or settings.get("model_type") != "segformer":
        return None
    native = SegformerConfig.from_dict({**settings, "num_attention_heads": heads})

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
    depths = []
    for index in STAGES:
        # not the largest number found: a name may claim block 10**12, and the check against the model finds gaps
        depth = 0
        while f"{stage(index)}blocks.{depth}.layernorm_before.weight" in shapes:
            depth += 1
        depths.append(depth)
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
    native = checkpoint.description.get("config.json", {}).get("num_attention_heads")
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
            try:
                yield ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, RecursionError):
                continue


def _stored_names(description: Mapping[str, Any], num_labels: int) -> Any:
    """The class names of the config, in order, else those beside the weights."""
    stored = description.get("config.json", {}).get("id2label")
    if isinstance(stored, Mapping):
        return [stored.get(str(index)) for index in range(num_labels)]
    return description["classes"]


def _processor(description: Mapping[str, Any]) -> dict[str, Any]:
    """ImageNet normalisation, as all three origins have; size and numbers of `preprocessor_config.json` if there."""
    stored = description.get("preprocessor_config.json", {})
    size = stored.get("size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    return {
        "do_resize": isinstance(size, Mapping) and stored.get("do_resize", True) is True,
        **({"size": dict(size)} if isinstance(size, Mapping) else {}),
        "image_mean": stored.get("image_mean", [0.485, 0.456, 0.406]),
        "image_std": stored.get("image_std", [0.229, 0.224, 0.225]),
    }


RECIPE = Recipe(
    title="SegFormer",
    url="https://github.com/NVlabs/SegFormer",
    citation=CITATION,
    signs=tuple(
        Sign(f"a tensor named {key}", partial(Evidence.has, pattern=re.escape(key) + "$")) for key in ORIGINS.values()
    ),
    read=read_segformer,
    plan=plan_segformer,
)
