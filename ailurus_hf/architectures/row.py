"""What a row of the table of architectures holds. Imports neither torch nor transformers: rows are read by `--help`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pkgutil import resolve_name
from typing import Any, NamedTuple

__all__ = ["FEATURES", "SEGMENTATION", "TASKS", "Architecture", "TokenStage", "merge_settings", "num_kept"]

FEATURES = "image-feature-extraction"
SEGMENTATION = "AutoModelForSemanticSegmentation"
TASKS = {  # Auto class of a model -> task, as the Hub names it
    "AutoModel": FEATURES,
    "AutoBackbone": FEATURES,
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVideoClassification": "video-classification",
    SEGMENTATION: "image-segmentation",
}


class TokenStage(NamedTuple):
    """The tokens of one part of a model between two changes of the grid, for one image size.

    Attributes:
        name: such as "stage 3"; "" where the model has one grid only.
        grid: (rows, columns) in tokens, of video (frames, rows, columns).
        pixels_per_token: along each side.
        hidden_size: width of the tokens.
        num_kept: number of tokens that the merged layers, or the heavy parts, run on; all of them where nothing is
            merged.
    """

    name: str
    grid: tuple[int, ...]
    pixels_per_token: int
    hidden_size: int
    num_kept: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the whole grid."""
        return math.prod(self.grid)


def num_kept(num_tokens: int, keep_ratio: float, num_clusters: int | None) -> int:
    """Number of tokens that a grid of `num_tokens` is merged into, see `resolve_num_groups`."""
    from ..modeling.settings import resolve_num_groups

    return resolve_num_groups(num_tokens, keep_ratio, num_clusters)


def merge_settings(config: Any) -> dict[str, Any]:
    """The settings of adaptive resolution, by name, with the layer that `cluster_layer=None` stands for."""
    from ..modeling.settings import AdaptiveResolutionMixin

    settings = {field.name: getattr(config, field.name) for field in fields(AdaptiveResolutionMixin)}
    return {**settings, "cluster_layer": config.num_dense_layers}


def grouping_flops(config: Any, stages: list[TokenStage]) -> int:
    """What grouping costs in the stages that merge, as the method's row says."""
    from ..modeling.reduction import GROUPINGS

    flops = GROUPINGS[config.grouping].flops
    merging = [stage for stage in stages if stage.num_kept < stage.num_tokens]
    return 0 if flops is None else sum(flops(config, stage.num_tokens, stage.hidden_size) for stage in merging)


def image_shape(config: Any, height: int, width: int) -> tuple[int, ...]:
    """Shape of the pixel values of one image."""
    return 1, config.num_channels, height, width


@dataclass(frozen=True)
class Architecture:
    """One row: an architecture's classes, and what the other parts of the package must know of it.

    The functions get the model's configuration: this package's, or its twin that a checkpoint brought along as code.
    It has `num_channels`, `patch_size` in pixels and `grid_size`, the grid in patches at the trained size; where the
    budget is `keep_ratio`, that and `num_clusters`; for segmentation also `semantic_loss_ignore_index`.

    Args:
        model_type: that of the configuration.
        classes: name of transformers' Auto class -> "module:Class". Must have AutoConfig and AutoImageProcessor; the
            others are models, see `TASKS`.
        stages: (config, height, width of an image in pixels) -> the tokens of every stage, first to last. Where the
            output has `assignment`, it is that of the only stage, or a tuple with one for each.
        facts: (config, Auto class of the model) -> what `info` shows of the architecture.
        card: the model card's lines that say what the encoder is, and its budget.
        settings: what `info` shows of the settings of the method.
        extra_flops: (config, stages) -> floating-point operations of one image's forward that are no matrix product,
            convolution or attention, which PyTorch counts by itself.
        budget: the setting that says how many tokens the model computes on: "keep_ratio", which at 1 is all of them, or
            "compressed_size", of which there is always less.
        example: a budget as an argument, for the model card's code.
        pixel_shape: (config, height, width) -> shape of one input, the batch's 1 in front.
        citation: BibTeX of the architecture's paper; "" for AiluRus's.
    """

    model_type: str
    classes: Mapping[str, str]
    stages: Callable[[Any, int, int], list[TokenStage]]
    facts: Callable[[Any, str], dict[str, Any]]
    card: Callable[[Any], list[str]]
    settings: Callable[[Any], dict[str, Any]] = merge_settings
    extra_flops: Callable[[Any, list[TokenStage]], int] = grouping_flops
    budget: str = "keep_ratio"
    example: str = "keep_ratio=0.25"
    pixel_shape: Callable[[Any, int, int], tuple[int, ...]] = image_shape
    citation: str = ""

    @property
    def models(self) -> dict[str, str]:
        """Name of each model class -> name of its Auto class."""
        return {path.rpartition(":")[2]: auto for auto, path in self.classes.items() if auto in TASKS}

    def load(self, auto_class: str) -> Any:
        """Import the class that an Auto class stands for."""
        return resolve_name(self.classes[auto_class])
