"""What a recipe is: how to read a source, and a plan (settings, rules, preprocessing) made from what was read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .rules import Rule

__all__ = ["Plan", "Recipe", "Reference", "SourceCheckpoint"]

# (source tensors by name, pixel_values (batch_size, num_channels, height, width)) -> the output `Plan.output`
Reference = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SourceCheckpoint:
    """A source, read.

    Args:
        weights_path: the file the tensors come from.
        tensors: its tensors by name, on the CPU, a `module.` prefix removed.
        description: the settings stored beside them.
        overrides: what the user asked for; a recipe may need it where neither file tells (number of heads, ...).
    """

    weights_path: Path
    tensors: Mapping[str, torch.Tensor]
    description: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How one source becomes one AiluRus checkpoint.

    Args:
        config: fields of `AiluRusConfig`.
        rules: what happens to each tensor.
        processor: arguments of `AiluRusImageProcessor`.
        model_class: public name of the model class.
        reference: the source's own forward, for verification; `None` when there is none.
        output: the model's output that the reference computes, such as "logits" or "last_hidden_state".
        recorded: names of outputs recorded in a `golden.safetensors` -> the model's output they are.
        pads_images: whether the source takes images that are no whole number of patches, as the models here do.
        resizes: whether the reference takes images of another size than the trained one.
        image_sizes: heights and widths to verify at; by default the trained size and, with `resizes`, another.
        license: the licence that the source names for its weights.
        notes: oddities of the source that the user should know.
    """

    config: Mapping[str, Any]
    rules: tuple[Rule, ...]
    processor: Mapping[str, Any]
    model_class: str = "AiluRusForSemanticSegmentation"
    reference: Reference | None = None
    output: str = "logits"
    recorded: Mapping[str, str] = field(default_factory=lambda: {"logits": "logits"})
    pads_images: bool = False
    resizes: bool = True
    image_sizes: tuple[tuple[int, int], ...] = ()
    license: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A source format.

    Args:
        title: what the source is called, for messages and the model card.
        url: where its code lives.
        citation: BibTeX of its paper.
        read: reads a file, a folder or (where that makes sense) a name on the Hub, safely.
        plan: makes the plan.
    """

    title: str
    url: str
    citation: str
    read: Callable[[str | Path], SourceCheckpoint]
    plan: Callable[[SourceCheckpoint], Plan]
