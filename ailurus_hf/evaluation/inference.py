"""From a picture to its label map."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.images import ImageFileError
from ..modeling.image_processing_ailurus import PictureArea, Span, label_maps, resized_strips
from ..modeling.label_maps import labels_of_logits
from ..registry import architecture_of, has_architecture
from .sliding_window import sliding_window_logits

__all__ = ["ClusterMap", "Segmentation", "class_scores", "segment_image"]


class ClusterMap(NamedTuple):
    """How the tokens of one grid of a model were merged.

    Attributes:
        name: the stage, such as "stage 3"; "" where the model has one grid only.
        clusters: (rows, columns) int64, cluster of every patch.
        patch_size: height and width of a patch in pixels of the picture (not whole numbers if it was resized).
    """

    name: str
    clusters: np.ndarray
    patch_size: tuple[float, float]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the merged layers run on."""
        return int(self.clusters.max()) + 1


class Segmentation(NamedTuple):
    """A picture's classes, and how its patches were merged.

    Attributes:
        labels: (height, width) int64, class of every pixel of the picture.
        stages: the clusters of every stage; none for sliding windows, several views and models that do not say.
    """

    labels: np.ndarray
    stages: tuple[ClusterMap, ...] = ()

    @property
    def clusters(self) -> np.ndarray | None:
        """Clusters of the only stage; None where there is none, or several."""
        return self.stages[0].clusters if len(self.stages) == 1 else None

    @property
    def patch_size(self) -> tuple[float, float] | None:
        """Height and width of the only stage's patches in pixels of the picture; None without clusters."""
        return self.stages[0].patch_size if len(self.stages) == 1 else None

    @property
    def num_tokens(self) -> int | None:
        """Number of patch tokens that the merged layers run on; None without clusters."""
        return self.stages[0].num_tokens if len(self.stages) == 1 else None


@torch.no_grad()
def class_scores(
    model: PreTrainedModel,
    pixel_values: Tensor,
    size: tuple[int, int] | None = None,
    *,
    sliding_window: bool = False,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Scores of the classes for every pixel, from one view of the pictures or several.

    One view gives logits. Several give the mean of their probabilities, softmax by view, as Segmenter and
    mmsegmentation do; of a model with one channel the sigmoid.

    Args:
        model: a semantic-segmentation model whose output has `logits` (B, num_labels, h, w), in evaluation mode.
        pixel_values: (B, 3, H, W), normalised.
        size: (height, width) of the result; None for that of `pixel_values`.
        sliding_window: predict window by window, with `config.window_size` and `config.window_stride`, and average.
        flip: add each view's mirror image.
        scales: factors by which the pictures are resized, one view each.

    Returns:
        (B, num_labels, height, width) float32 logits or probabilities.

    Raises:
        ValueError: `sliding_window` for a model whose configuration has no `window_size`, or scales that are not
            positive.
    """
    input_size = (pixel_values.shape[-2], pixel_values.shape[-1])
    return _scores(model, pixel_values, _whole_area(input_size, size or input_size), sliding_window, flip, scales)


def _scores(
    model: PreTrainedModel,
    pixel_values: Tensor,
    area: PictureArea,
    sliding_window: bool,
    flip: bool,
    scales: Sequence[float],
) -> Tensor:
    """`class_scores` of what the model sees of the picture, (B, num_labels, rows.seen, columns.seen)."""
    size = (area.rows.seen, area.columns.seen)
    views = _views(model, pixel_values, area, sliding_window, flip, scales)
    count = len(scales) * (1 + flip)
    if count == 1:
        return _resize(next(views), size)
    # A running sum: a view is forgotten before the next one is made.
    total = torch.zeros(())
    for logits in views:
        if not total.ndim:
            total = logits.new_zeros(*logits.shape[:2], *size)
        for columns, strip in resized_strips(logits, size):
            total[..., columns] += _probabilities(strip)
        del logits
    return total.div_(count)


def _label_map_of_views(
    model: PreTrainedModel,
    pixel_values: Tensor,
    area: PictureArea,
    sliding_window: bool,
    flip: bool,
    scales: Sequence[float],
) -> Tensor:
    """(rows.seen, columns.seen) class with the largest of `_scores`, for one picture."""
    threshold = _threshold(model)
    size = (area.rows.seen, area.columns.seen)
    height, width = pixel_values.shape[-2:]
    if height * width * sum(scale**2 for scale in scales) * (1 + flip) > size[0] * size[1]:
        scores = _scores(model, pixel_values, area, sliding_window, flip, scales)[0]
        several = len(scales) * (1 + flip) > 1
        return _likeliest(scores, threshold) if several else labels_of_logits(scores, threshold)
    # The views together are smaller than the picture: they are kept, and added up strip by strip.
    views = list(_views(model, pixel_values, area, sliding_window, flip, scales))
    tallest = max(logits.shape[-2] for logits in views)
    strips = [resized_strips(logits, size, tallest) for logits in views]
    labels = torch.empty(size, dtype=torch.int64, device=pixel_values.device)
    for columns, strip in strips[0]:
        total = _probabilities(strip)
        for others in strips[1:]:
            total += _probabilities(next(others)[1])
        labels[:, columns] = _likeliest(total.div_(len(views))[0], threshold)
    return labels


def _threshold(model: PreTrainedModel) -> float:
    return getattr(model.config, "binary_threshold", 0.5)


def _probabilities(logits: Tensor) -> Tensor:
    """Of each class, or with one channel of the foreground: (B, num_labels, height, width) -> same."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _likeliest(probabilities: Tensor, threshold: float) -> Tensor:
    """(num_labels, height, width) -> (height, width) int64 classes."""
    return (probabilities[0] > threshold).long() if len(probabilities) == 1 else probabilities.argmax(0)


def _views(
    model: PreTrainedModel,
    pixel_values: Tensor,
    area: PictureArea,
    sliding_window: bool,
    flip: bool,
    scales: Sequence[float],
) -> Iterator[Tensor]:
    """Logits of one view after the other, at the model's resolution and of the picture alone."""
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be one or more numbers above 0, got {list(scales)}")
    for scale in scales:
        height, width = (max(round(side * scale), 1) for side in pixel_values.shape[-2:])
        view = _resize(pixel_values, (height, width))
        yield area.cut(_logits(model, view, sliding_window))
        if flip:
            yield area.cut(_logits(model, view.flip(-1), sliding_window).flip(-1))


@torch.no_grad()
def segment_image(
    model: PreTrainedModel,
    image_processor: Any,
    image: Image.Image,
    sliding_window: bool = False,
    *,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Segmentation:
    """Segment one picture.

    Args:
        model: a semantic-segmentation model in evaluation mode, on any device.
        image_processor: its image processor.
        image: an RGB picture of any size.
        sliding_window, flip, scales: the views, see `class_scores`.

    Raises:
        ImageFileError: the picture, or a view of it, is smaller than a patch.
        ValueError: as in `class_scores`.
    """
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    if not sliding_window:  # windows are enlarged to their size
        _check_size(model.config, [min(scales, default=1) * side for side in pixel_values.shape[-2:]])
    area = _picture_area(image_processor, image, (pixel_values.shape[-2], pixel_values.shape[-1]))
    if sliding_window or flip or tuple(scales) != (1.0,):
        labels = _label_map_of_views(model, pixel_values, area, sliding_window, flip, scales)
        return Segmentation(area.whole(labels).cpu().numpy())
    # One view of the whole picture: the only case with clusters to tell of.
    output = model(pixel_values)
    labels = label_maps(class_logits(output), area, _threshold(model))[0]
    return Segmentation(labels.cpu().numpy(), _cluster_maps(model.config, output, area))


def _check_size(config: Any, size: Sequence[float]) -> None:
    """A picture's fault, told apart from those of the model and its settings."""
    patch = getattr(config, "patch_size", None)
    height, width = (max(round(side), 1) for side in size)
    if isinstance(patch, int) and min(height, width) < patch:
        raise ImageFileError(
            f"pixel_values must be at least one patch of {patch} x {patch} pixels, got height and width "
            f"{(height, width)}"
        )


def _picture_area(image_processor: Any, image: Image.Image, input_size: tuple[int, int]) -> PictureArea:
    """Where the picture lies in what the processor made of it; processors that do not say show all of it."""
    size = (image.height, image.width)
    if hasattr(image_processor, "picture_areas"):
        area: PictureArea = image_processor.picture_areas([size])[0]
        if area.input_size == input_size:
            return area
    return _whole_area(input_size, size)


def _whole_area(input_size: tuple[int, int], size: tuple[int, int]) -> PictureArea:
    return PictureArea(input_size, *(Span(n, 0, n, 0, m, m) for n, m in zip(input_size, size, strict=True)))


def _cluster_maps(config: Any, output: Any, area: PictureArea) -> tuple[ClusterMap, ...]:
    """The first picture's clusters in every stage; none where the grid does not begin with the picture."""
    assignments = getattr(output, "assignment", None)
    rows, columns = area.rows, area.columns
    if assignments is None or not has_architecture(config) or any(span.start or span.first for span in (rows, columns)):
        return ()
    height, width = area.input_size
    stages = architecture_of(config).stages(config, height, width)
    assignments = [assignments] if isinstance(assignments, Tensor) else assignments
    return tuple(
        ClusterMap(
            stage.name,
            assignment[0].view(stage.grid).cpu().numpy(),
            (
                stage.pixels_per_token * rows.seen / rows.length,
                stage.pixels_per_token * columns.seen / columns.length,
            ),
        )
        for stage, assignment in zip(stages, assignments, strict=True)
    )


def class_logits(output: Any) -> Tensor:
    """Logits of the classes for every pixel (B, num_labels, h, w) from a model's output.

    Of mask classification (Mask2Former, EoMT), the logarithm of what the queries together say: the sum over them of the
    probability of the class, among those that are no "no object", times that of the mask.

    Raises:
        TypeError: the output has neither.
    """
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is not None:
        return logits
    if getattr(output, "masks_queries_logits", None) is None:
        raise TypeError(f"the model must be one for semantic segmentation, whose output has logits, got {type(output)}")
    classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
    shares = torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.float().sigmoid())
    return shares.clamp(min=torch.finfo(torch.float32).tiny).log()


def _logits(model: PreTrainedModel, view: Tensor, sliding_window: bool) -> Tensor:
    if not sliding_window:
        return class_logits(model(pixel_values=view)).float()
    config = model.config
    if getattr(config, "window_size", None) is None:
        raise ValueError("sliding_window needs config.window_size, which this model does not have")
    stride = config.window_stride or config.window_size
    return sliding_window_logits(model, view, config.window_size, stride).float()


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear; maps of the right size stay as they are."""
    if (maps.shape[-2], maps.shape[-1]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear")
