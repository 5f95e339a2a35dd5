"""Recognising a source by what only its format has: `ailurus-hf convert auto`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..registry import ARCHITECTURES
from ..utils.errors import CheckpointError
from .reading.sources import find_weights, locate, read_json, read_tensors
from .recipes.segformer import ORIGINS
from .recipes.transformers_vit import FAMILIES
from .unsupported import refuse_unsupported

__all__ = ["SIGNS", "Evidence", "Sign", "recognise"]

_TIMM_BLOCK = re.compile(r"(backbone\.)?blocks\.\d+\.(\d+\.)?attn\.qkv\.weight")


@dataclass(frozen=True)
class Evidence:
    """What a source shows of itself.

    Args:
        tensors: shapes of its tensors by name, a `module.` prefix removed.
        container: keys of the file's outer dictionary, where the tensors are inside one of its entries.
        config: the `config.json` beside the weights, or nothing.
    """

    tensors: Mapping[str, tuple[int, ...]]
    container: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    def has(self, pattern: str) -> bool:
        """Whether a tensor's name begins with this regular expression."""
        return any(re.match(pattern, name) for name in self.tensors)

    @property
    def timm_blocks(self) -> bool:
        """Whether the blocks are named as timm does; DINO, DINOv2 and MAE do so too."""
        return any(_TIMM_BLOCK.fullmatch(name) for name in self.tensors)


@dataclass(frozen=True)
class Sign:
    """One thing by which a format is recognised.

    Args:
        recipe: name of the recipe.
        looks_for: what it is, for messages.
        certain: whether no other format has it; signs that several formats share make the source ambiguous.
    """

    recipe: str
    looks_for: str
    found: Callable[[Evidence], bool]
    certain: bool = True


def _model_type(evidence: Evidence) -> str:
    return str((evidence.config or {}).get("model_type"))


def _bare_timm(evidence: Evidence) -> bool:
    return evidence.timm_blocks and not evidence.container and not evidence.config


def _in_model(evidence: Evidence) -> bool:
    return evidence.timm_blocks and "model" in evidence.container


SIGNS = (
    Sign("ailurus", "config.json with a model_type of this package", lambda e: _model_type(e) in ARCHITECTURES),
    Sign("transformers", "config.json with a model_type of a plain ViT", lambda e: _model_type(e) in FAMILIES),
    Sign(
        "timm",
        "config.json with timm's 'architecture', and tensors named blocks.0.attn.qkv.weight",
        lambda e: e.timm_blocks and "architecture" in (e.config or {}),
    ),
    Sign(
        "segmenter",
        "tensors named encoder.blocks.0.attn.qkv.weight and decoder.*",
        lambda e: e.has(r"encoder\.blocks\.\d+\.attn\.qkv\.") and e.has(r"decoder\."),
    ),
    Sign(
        "mmseg",
        "tensors named backbone.layers.0.attn.attn.in_proj_weight and decode_head.*",
        lambda e: e.has(r"backbone\.layers\.\d+\.attn\.attn\.in_proj_weight") and e.has(r"decode_head\."),
    ),
    Sign(
        "dinov2",
        "tensors named mask_token, blocks.0.ls1.gamma and blocks.0.attn.qkv.weight",
        lambda e: e.timm_blocks and e.has(r"(backbone\.)?mask_token$") and e.has(r"(backbone\.)?blocks\..*ls1\.gamma"),
    ),
    Sign(
        "dino",
        "an entry 'teacher' with tensors named backbone.blocks.0.attn.qkv.weight and head.last_layer.*",
        lambda e: "teacher" in e.container and e.timm_blocks and e.has(r"head\.last_layer\."),
    ),
    Sign(
        "mae",
        "tensors named decoder_blocks.*, decoder_pos_embed and blocks.0.attn.qkv.weight",
        lambda e: e.timm_blocks and e.has(r"decoder_blocks\.") and e.has(r"decoder_pos_embed"),
    ),
    Sign("mae", "an entry 'model' with tensors named blocks.0.attn.qkv.weight", _in_model, certain=False),
    Sign("timm", "an entry 'model' with tensors named blocks.0.attn.qkv.weight", _in_model, certain=False),
    Sign("dino", "tensors named blocks.0.attn.qkv.weight, without settings", _bare_timm, certain=False),
    Sign("timm", "tensors named blocks.0.attn.qkv.weight, without settings", _bare_timm, certain=False),
)


def recognise(source: str | Path) -> tuple[str, str]:
    """Find the recipe for a source.

    Returns:
        The recipe's name, and what it was recognised by.

    Raises:
        FileNotFoundError: the source or its weights are missing.
        CheckpointError: the source is unreadable, of an unsupported family, ambiguous, or none that is known.
    """
    evidence = _gather(source)
    if _model_type(evidence) in ARCHITECTURES:  # first: their tensors may have the names of another project
        return "ailurus", f"it has {SIGNS[0].looks_for}"
    if segformer := next((key for key in ORIGINS.values() if key in evidence.tensors), None):
        return "segformer", f"it has a tensor named {segformer}"
    refuse_unsupported(source, evidence.tensors, _model_type(evidence))
    found = [sign for sign in SIGNS if sign.found(evidence)]
    chosen = [sign for sign in found if sign.certain] or found
    names = list(dict.fromkeys(sign.recipe for sign in chosen))
    if len(names) == 1:
        return names[0], f"it has {chosen[0].looks_for}"
    if names:
        reasons = " and ".join(dict.fromkeys(sign.looks_for for sign in chosen))
        raise CheckpointError(
            f"{source} is ambiguous: it has {reasons}, as sources for {' and '.join(map(repr, names))} do; "
            "name the recipe instead of 'auto'"
        )
    looked_for = "; ".join(f"{sign.recipe}: {sign.looks_for}" for sign in SIGNS if sign.certain)
    looked_for += f"; segformer: a tensor named {' or '.join(ORIGINS.values())}"
    raise CheckpointError(f"{source} is not recognised; looked for {looked_for}")


def _gather(source: str | Path) -> Evidence:
    weights = find_weights(locate(source))
    content = read_tensors(weights, objects=True)
    inner = next((content[name] for name in ("state_dict", "model", "teacher") if _tensors(content.get(name))), None)
    shapes = {name.removeprefix("module."): tuple(t.shape) for name, t in _tensors(inner or content).items()}
    config = weights.parent / "config.json"
    return Evidence(
        shapes,
        container=tuple(map(str, content)) if inner is not None else (),
        config=read_json(config) if config.is_file() else None,
    )


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
