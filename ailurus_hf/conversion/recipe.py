"""What a recipe is: how to read a source, and a plan (settings, rules, preprocessing) made from what was read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .rules import Rule

__all__ = ["Plan", "Recipe", "Reference", "SourceCheckpoint"]

# (source tensors by name, pixel_values (batch_size, num_channels, height, width)) -> logits
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
        notes: oddities of the source that the user should know.
    """

    config: Mapping[str, Any]
    rules: tuple[Rule, ...]
    processor: Mapping[str, Any]
    model_class: str = "AiluRusForSemanticSegmentation"
    reference: Reference | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A source format.

    Args:
        title: what the source is called, for messages and the model card.
        url: where its code lives.
        citation: BibTeX of its paper.
        read: reads a file or folder safely.
        plan: makes the plan.
    """

    title: str
    url: str
    citation: str
    read: Callable[[str | Path], SourceCheckpoint]
    plan: Callable[[SourceCheckpoint], Plan]
