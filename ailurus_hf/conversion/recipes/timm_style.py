"""What checkpoints with timm's names (`blocks.0.attn.qkv.weight`, ...) share: timm, DINO, DINOv2, MAE, Segmenter.

The tensors tell nearly everything: sizes, which tokens there are, LayerScale, biases, heads. What they cannot tell
(number of attention heads, a grid that is not square, epsilon, how positions are resized) the recipe must know.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...modeling.modeling_ailurus import AiluRusForImageClassification, AiluRusModel
from ...utils.errors import CheckpointError
from ..reading.sources import choose_entry, read_tensors, tensors_of
from ..recipe import Pictures, Plan, Sign, SourceCheckpoint
from ..references.pictures import Preprocessing
from ..references.vit import ViTForward
from ..rules import PARAM, Rename, Rule, SplitRows, match, renames

__all__ = [
    "BARE",
    "BLOCK",
    "IMAGENET",
    "IMAGENET_PICTURES",
    "IN_MODEL",
    "TimmParts",
    "block_rules",
    "count_blocks",
    "encoder_plan",
    "encoder_rules",
    "encoder_settings",
    "position_settings",
    "read_bare",
    "rows_of",
]

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
IMAGENET_PICTURES = Pictures(IMAGENET, preprocess=Preprocessing(IMAGENET["image_mean"], IMAGENET["image_std"]))
PUBLISHED_HEADS = {
    192: 3,
    384: 6,
    512: 8,
    640: 10,
    768: 12,
    1024: 16,
    1152: 16,
    1280: 16,
    1408: 16,
    1536: 24,
    1664: 16,
}  # width of the tokens -> attention heads, in the ViTs that timm, DINO, DINOv2 and MAE publish

BLOCK = r"(backbone\.)?blocks\.\d+\.(\d+\.)?attn\.qkv\.weight$"  # a name that all of these formats have
IN_MODEL = Sign(
    "an entry 'model' with tensors named blocks.0.attn.qkv.weight",
    lambda evidence: evidence.has(BLOCK) and "model" in evidence.container,
    certain=False,
)
BARE = Sign(
    "tensors named blocks.0.attn.qkv.weight, without settings",
    lambda evidence: evidence.has(BLOCK) and not evidence.container and not evidence.config,
    certain=False,
)


@dataclass(frozen=True)
class TimmParts:
    """Which optional parts a checkpoint has, read off its tensor names.

    Args:
        keys: the tensor names.
        prefix: what precedes each name of the encoder, such as "backbone." or "".
        register_name: what the register tokens are called, "reg_token" (timm) or "register_tokens" (DINOv2).
    """

    keys: Collection[str]
    prefix: str = ""
    register_name: str = "reg_token"

    @cached_property
    def block(self) -> str:
        """The pattern of a block's names, which DINOv2 trained with FSDP numbers twice: `blocks.<chunk>.<block>`."""
        chunked = Rename(f"{self.prefix}blocks.{{chunk}}.{{layer}}.{{rest:*}}", "")
        found = any(match(chunked, key) is not None for key in self.keys)
        return self.prefix + ("blocks.{chunk}.{layer}" if found else "blocks.{layer}")

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name (without the prefix)."""
        return self.prefix + name in self.keys

    def block_has(self, name: str) -> bool:
        """Whether some block has a tensor of this name."""
        rule = Rename(f"{self.block}.{name}", "")
        return any(match(rule, key) is not None for key in self.keys)


def read_bare(weights: Path, entry: str | None = None, *, entries: Sequence[str]) -> SourceCheckpoint:
    """Read a file without settings: the tensors of an entry, whatever is beside them, or the whole file.

    Args:
        weights: the file.
        entry: the entry that the user names.
        entries: those to look for.

    Raises:
        CheckpointError: a file is unreadable or unsafe, or holds no state dict.
    """
    content = read_tensors(weights, objects=True)
    entry, notes = choose_entry(content, weights, entries, entry)
    return SourceCheckpoint(weights, tensors_of(content, weights, entry), description={}, notes=notes)


def block_rules(
    block: str, layer: str, layer_scale: bool = False, qk_norm: bool = False, gated: bool = False
) -> tuple[Rule, ...]:
    """The rules of one block: attention, norms, MLP and, where wanted, LayerScale and query and key norms.

    Args:
        block: pattern of the source's block, such as "blocks.{layer}".
        layer: the model's layer, such as "ailurus.layers.{layer}".
        gated: whether the MLP is DINOv2's; the rows of its fused `w12` are the gate, then the value.
    """
    qkv = tuple(f"{layer}.attention.{name}_proj.{{param}}" for name in "qkv")
    names = {"norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after"}
    if qk_norm:
        names |= {"attn.{norm:q_norm|k_norm}": "attention.{norm}"}
    names |= {"mlp.w3": "mlp.down_proj"} if gated else {"mlp.{fc:fc1|fc2}": "mlp.{fc}"}
    rules = (*renames(names, f"{block}.", f"{layer}."), SplitRows(f"{block}.attn.qkv.{PARAM}", qkv))
    if layer_scale:
        rules += tuple(Rename(f"{block}.ls{i}.gamma", f"{layer}.layer_scale{i}.lambda1") for i in (1, 2))
    if gated:
        gate_and_value = tuple(f"{layer}.mlp.{name}_proj.{{param}}" for name in ("gate", "up"))
        rules += (SplitRows(f"{block}.mlp.w12.{PARAM}", gate_and_value),)
    return rules


def encoder_rules(parts: TimmParts, target: str) -> tuple[Rule, ...]:
    """The table of the encoder, with the rules that the parts present need.

    Args:
        target: what precedes the model's names, "ailurus." in a model with a head, else "".
    """
    source, block, layer = parts.prefix, parts.block, f"{target}layers.{{layer}}"
    layer_scale, qk_norm = parts.block_has("ls1.gamma"), parts.block_has("attn.q_norm.weight")
    tokens = {"cls_token": "cls_token", "dist_token": "distillation_token", parts.register_name: "register_tokens"}
    norms = {"norm": "layernorm", "fc_norm": "pooler_norm"}
    return (
        *(Rename(source + name, f"{target}embeddings.{new}") for name, new in tokens.items() if parts.has(name)),
        Rename(f"{source}pos_embed", f"{target}embeddings.position_embeddings"),
        *renames({"patch_embed.proj": "embeddings.patch_embeddings.projection"}, source, target),
        *block_rules(block, layer, layer_scale, qk_norm, gated=parts.block_has("mlp.w12.weight")),
        *renames({name: new for name, new in norms.items() if parts.has(f"{name}.weight")}, source, target),
    )


def encoder_settings(
    checkpoint: SourceCheckpoint,
    parts: TimmParts,
    image_size: Any = None,
    prefix_positions: int | None = None,
    heads: Any = None,
) -> dict[str, Any]:
    """The fields of `AiluRusConfig` that the tensors tell.

    Args:
        image_size: (height, width) in pixels or a number, where the source knows; else the grid must be square.
        prefix_positions: how many rows of the position table belong to class, distillation and register tokens; by
            default each of them has one.
        heads: number of attention heads, where the source knows.

    Raises:
        CheckpointError: a tensor that every ViT has is missing or of another kind, or the number of heads or the
            grid cannot be told.
    """
    patches = _tensor(checkpoint, f"{parts.prefix}patch_embed.proj.weight", ndim=4)
    hidden_size, num_channels, patch_size, patch_width = patches.shape
    if patch_size != patch_width:
        raise CheckpointError(f"patches of {patch_size} x {patch_width} pixels are not supported: they must be square")
    layers = count_blocks(checkpoint.tensors, parts.block)
    # what the user says, what the source says, or that of published ViTs this wide
    heads = checkpoint.overrides.get("num_attention_heads", heads) or PUBLISHED_HEADS.get(hidden_size)
    if type(heads) is not int:
        raise CheckpointError(
            f"{checkpoint.weights_path} does not tell its number of attention heads, and none is published for tokens "
            f"{hidden_size} wide; add --set num_attention_heads=N"
        )
    # all blocks have the same sizes, or the check against the model names the one that has not
    gated, first = parts.block_has("mlp.w12.weight"), parts.block.format(chunk=0, layer=0)
    mlp_rows = rows_of(checkpoint, f"{first}.mlp.{'w12' if gated else 'fc1'}.weight")
    name = parts.prefix + parts.register_name
    registers = _tensor(checkpoint, name, ndim=3).shape[1] if name in checkpoint.tensors else 0
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "patch_size": patch_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "use_swiglu_ffn": gated,
        "intermediate_size": mlp_rows // 2 if gated else mlp_rows,
        "patch_bias": parts.has("patch_embed.proj.bias"),
        "qkv_bias": parts.block_has("attn.qkv.bias"),
        "use_qk_norm": parts.block_has("attn.q_norm.weight"),
        "layerscale_value": 1.0 if parts.block_has("ls1.gamma") else None,
        "use_final_norm": parts.has("norm.weight"),
        "use_pooler_norm": parts.has("fc_norm.weight"),
        "use_cls_token": parts.has("cls_token"),
        "use_distillation_token": parts.has("dist_token"),
        "num_register_tokens": registers,
        "layer_norm_eps": 1e-6,
    }
    tokens = settings["use_cls_token"] + settings["use_distillation_token"] + settings["num_register_tokens"]
    rows = _tensor(checkpoint, f"{parts.prefix}pos_embed", ndim=3).shape[1]
    settings["num_prefix_positions"] = tokens if prefix_positions is None else prefix_positions
    size = checkpoint.overrides.get("image_size", image_size)
    settings["image_size"] = size or _square(rows - settings["num_prefix_positions"], patch_size)
    return settings


def count_blocks(tensors: Mapping[str, Any], block: str) -> int:
    """The number of blocks of this pattern, with a placeholder {layer}.

    Raises:
        CheckpointError: there are none, or numbers are left out.
    """
    rule = Rename(f"{block}.{{rest:*}}", "")
    found = {int(values["layer"]) for key in tensors if (values := match(rule, key)) is not None}
    if not found:
        raise CheckpointError(f"the checkpoint holds no blocks named {block}")
    missing = sorted(set(range(min(max(found) + 1, 10_000))) - found)  # a name may claim block 10**12
    if missing:
        raise CheckpointError(f"missing in the checkpoint: all of {block.replace('{layer}', str(missing[0]))}")
    return len(found)


def position_settings(offset: float = 0.0, antialias: bool = False) -> dict[str, Any]:
    """The fields of `AiluRusConfig` that say how positions are resized: bicubic, whenever the grid differs."""
    return {
        "position_interpolation": "bicubic",
        "position_offset": offset,
        "position_antialias": antialias,
        "position_resize_rule": "shape",
    }


def encoder_plan(
    checkpoint: SourceCheckpoint,
    parts: TimmParts,
    config: Mapping[str, Any],
    *,
    classifiers: Mapping[str, str] = {},
    unused: tuple[Rule, ...] = (),
    recorded: Mapping[str, str] | None = None,
    pictures: Pictures = IMAGENET_PICTURES,
    license: str | None = None,
    assumptions: tuple[str, ...] = (),
) -> Plan:
    """The plan for a bare encoder, or for one with classifiers.

    Args:
        config: fields of the model's config, except those of the classifiers.
        classifiers: names of the classifiers that the source has -> ours.
        unused: rules for what has no place in the model.
        pictures: how pictures are prepared.
        recorded, license, assumptions: as in `Plan`; the number of heads is added where nothing told it.
    """
    config = dict(config)
    if classifiers:
        config["num_labels"] = rows_of(checkpoint, f"{next(iter(classifiers))}.weight")
        config["use_distillation_classifier"] = len(classifiers) > 1
    return Plan(
        config=config,
        rules=(*encoder_rules(parts, "ailurus." if classifiers else ""), *renames(classifiers), *unused),
        processor=dict(pictures.processor),
        preprocess=pictures.preprocess,
        model_class=AiluRusForImageClassification if classifiers else AiluRusModel,
        reference=ViTForward(config, parts.prefix, parts.register_name, tuple(classifiers)),
        output="logits" if classifiers else "last_hidden_state",
        recorded=recorded or {"logits": "logits"},
        license=license,
        assumptions=assumptions + _assumed_heads(checkpoint, config),
    )


def _assumed_heads(checkpoint: SourceCheckpoint, config: Mapping[str, Any]) -> tuple[str, ...]:
    arguments = checkpoint.description.get("model_args")  # of timm
    told = isinstance(arguments, Mapping) and arguments.get("num_heads")
    if told or "num_attention_heads" in checkpoint.overrides:
        return ()
    return (
        f"num_attention_heads={config['num_attention_heads']}, as in published models of {config['hidden_size']} "
        "channels, since the file does not tell; --set num_attention_heads=N sets another",
    )


def rows_of(checkpoint: SourceCheckpoint, name: str) -> int:
    """The number of rows of a matrix, such as a classifier's classes."""
    return _tensor(checkpoint, name, ndim=2).shape[0]


def _square(rows: int, patch_size: int) -> int:
    side = math.isqrt(max(rows, 0))
    if side == 0 or side * side != rows:
        raise CheckpointError(
            f"the position table has {rows} rows for patches, which is no square grid; "
            f"add --set image_size=[HEIGHT,WIDTH] in pixels"
        )
    return side * patch_size


def _tensor(checkpoint: SourceCheckpoint, name: str, ndim: int) -> torch.Tensor:
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"missing key in the checkpoint: {name}")
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise CheckpointError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
    return tensor
