"""What a recipe is: signs by which a source is recognised, a reader, and a plan made from what was read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.modeling_ailurus import AiluRusForSemanticSegmentation
from ..modeling.reduction import GROUPINGS
from ..modeling.settings import AdaptiveResolutionMixin
from .reading.sources import find_weights
from .rules import Rule

__all__ = [
    "Evidence",
    "Pictures",
    "Plan",
    "Preprocess",
    "Recipe",
    "Reference",
    "Sign",
    "SourceCheckpoint",
    "cluster_layer_of",
]

# (source tensors by name, pixel_values (batch_size, num_channels, height, width)) -> the output `Plan.output`
Reference = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
# RGB picture (3, height, width) uint8 -> the source's pixel_values (1, num_channels, rows, columns)
Preprocess = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evidence:
    """What a source shows of itself.

    Args:
        tensors: shapes of its tensors by name, without what stands before every name.
        container: keys of the file's outer dictionary, where the tensors are inside one of its entries.
        config: the `config.json` beside the weights, or nothing.
    """

    tensors: Mapping[str, tuple[int, ...]]
    container: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def has(self, pattern: str) -> bool:
        """Whether a tensor's name begins with this regular expression."""
        return any(re.match(pattern, name) for name in self.tensors)

    @property
    def model_type(self) -> str:
        """The `model_type` of its config, as text."""
        return str(self.config.get("model_type"))


@dataclass(frozen=True)
class Sign:
    """One thing by which a format is recognised.

    Args:
        looks_for: what it is, for messages.
        found: whether a source has it.
        certain: whether no other format has it; signs that several formats share make the source ambiguous.
    """

    looks_for: str
    found: Callable[[Evidence], bool]
    certain: bool = True


@dataclass(frozen=True)
class SourceCheckpoint:
    """A source, read.

    Args:
        weights_path: the file the tensors come from.
        tensors: its tensors by name, on the CPU, without what stands before every name.
        description: the settings stored beside them.
        notes: oddities of the file that the user should know.
        overrides: what the user asked for; a recipe may need it where neither file tells (number of heads, ...).
    """

    weights_path: Path
    tensors: Mapping[str, torch.Tensor]
    description: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """How a source takes pictures: `processor`, `bgr`, `preprocess` and notes as in [`Plan`]."""

    processor: Mapping[str, Any]
    bgr: bool = False
    preprocess: Preprocess | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How one source becomes one AiluRus checkpoint.

    Args:
        config: fields of the model's config.
        rules: what happens to each tensor.
        processor: arguments of `AiluRusImageProcessor`.
        model_class: class of the result, whose config class takes `config`.
        reference: the source's own forward, for verification; `None` when there is none.
        preprocess: the source's own way from a picture to its pixel values, for verification; `None` when it is not
            known.
        bgr: whether the source's pixel values are blue, green, red. The models here take red, green, blue: the input
            channels of the first convolution are turned around, and `processor` must be in the turned order.
        output: the model's output that the reference computes, such as "logits" or "last_hidden_state".
        recorded: names of outputs recorded in a `golden.safetensors` -> the model's output they are.
        pads_images: whether the source takes images that are no whole number of patches, as the models here do.
        resizes: whether the reference takes images of another size than the trained one.
        image_sizes: heights and widths to verify at; by default the trained size and, with `resizes`, another.
        license: the licence that the source names for its weights.
        notes: oddities of the source that the user should know.
        assumptions: what no file tells and the recipe takes from published models, and how to set it otherwise. The
            reference believes it too, so that only recorded outputs can show it wrong.
    """

    config: Mapping[str, Any]
    rules: tuple[Rule, ...]
    processor: Mapping[str, Any]
    model_class: type[PreTrainedModel] = AiluRusForSemanticSegmentation
    reference: Reference | None = None
    preprocess: Preprocess | None = None
    bgr: bool = False
    output: str = "logits"
    recorded: Mapping[str, str] = field(default_factory=lambda: {"logits": "logits"})
    pads_images: bool = False
    resizes: bool = True
    image_sizes: tuple[tuple[int, int], ...] = ()
    license: str | None = None
    notes: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A source format.

    Args:
        title: what the source is called, for messages and the model card.
        url: where its code lives.
        citation: BibTeX of its paper.
        signs: what it is recognised by.
        read: reads the weights found, and the settings in or beside them, safely; of a file with several entries of
            weights the one that the user names.
        plan: makes the plan.
        find: finds the weights: a file, in a folder or (where that makes sense) under a name on the Hub.
        relatives: recipes for sources that look alike, such as other model families of the same project; a source of
            theirs is handed to them.
    """

    title: str
    url: str = ""
    citation: str = ""
    signs: tuple[Sign, ...]
    read: Callable[[Path, str | None], SourceCheckpoint]
    plan: Callable[[SourceCheckpoint], Plan]
    find: Callable[[str | Path], Path] = find_weights
    relatives: tuple[str, ...] = ()


def cluster_layer_of(depth: int, settings: Mapping[str, Any]) -> int | None:
    """The setting `cluster_layer` for a model of `depth` layers: None, which is the method's own, or less where that
    would leave no layer to run on merged tokens."""
    method = GROUPINGS.get(settings.get("grouping", AdaptiveResolutionMixin.grouping))
    return None if method is None or method.cluster_layer < depth else max(0, depth - 1)
