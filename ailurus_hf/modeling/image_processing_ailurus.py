"""Image processor for AiluRus models. Needs Pillow and numpy, no torchvision."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, ImageType, PILImageResampling, get_image_type
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .label_maps import labels_of_logits

logger = logging.get_logger(__name__)

STRIP = 2**26  # logits that are resized at a time: 256 MB of float32
IGNORE_INDEX = 255  # transformers' own: what reducing labels turns 0 into, and leaves as it is


class AiluRusImageProcessorKwargs(ImagesKwargs, total=False):
    """
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether to subtract 1 from every label and turn 0 into `ignore_index`: for data sets, such as ADE20K, whose
        label 0 is no class. Labels of 255 are ignored too, as in transformers.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        Label of pixels that do not count, such as those that padding and cropping add.
    binary_threshold (`float`, *optional*, defaults to `self.binary_threshold`):
        Probability above which a pixel is foreground, for models with one channel; as in the model's configuration.
    """

    do_reduce_labels: bool
    ignore_index: int
    binary_threshold: float


def reduce_labels(labels: np.ndarray, ignore_index: int = IGNORE_INDEX, num_labels: int | None = None) -> np.ndarray:
    """Subtract 1 from every label of a data set whose label 0 is no class.

    0 becomes `ignore_index`. So do 255, which transformers never reduces, and `ignore_index` itself, unless the value
    is that of a class.

    Args:
        labels: integers of any shape.
        ignore_index: label of pixels that do not count.
        num_labels: number of classes, whose values before are 1 to `num_labels`. None if it is unknown: then 255 is no
            class, and a positive `ignore_index` is one.

    Returns:
        int64, of the same shape.
    """
    ignored = labels == 0
    if num_labels is None or num_labels < IGNORE_INDEX:
        ignored |= labels == IGNORE_INDEX
    if ignore_index < 0 or (num_labels is not None and ignore_index > num_labels):
        ignored |= labels == ignore_index
    return np.where(ignored, ignore_index, labels.astype(np.int64) - 1)


def eight_bits(greys: np.ndarray) -> np.ndarray:
    """Greys of 16 bits (height, width) scaled to uint8, where Pillow would clip them at 255."""
    return (greys.astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)


def _to_bytes(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """(1, height, width) labels -> (4, height, width) uint8, all 0 where the label is `ignore_index`.

    The backend resizes through Pillow, whose pictures have 8 bits a channel, and fills with 0.
    """
    if len(labels) != 1:
        raise ValueError(f"segmentation_maps must have one label per pixel, got {len(labels)} channels")
    values = labels[0].astype(np.int32, order="C")
    if not np.array_equal(values, labels[0]):
        raise ValueError("segmentation_maps must hold integers of at most 32 bits, got others")
    values ^= np.int32(ignore_index)
    return np.moveaxis(values[..., None].view(np.uint8), -1, 0)


def _from_bytes(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """What `_to_bytes` was given, (height, width) int64."""
    values = np.ascontiguousarray(np.moveaxis(labels, 0, -1)).view(np.int32)[..., 0]
    return (values ^ np.int32(ignore_index)).astype(np.int64)


class Span(NamedTuple):
    """Where a picture lies along one axis of the model's input, in pixels.

    Attributes:
        input_length: of the input, without what is filled to make all pictures of a batch equal.
        start, length: the part of it that shows the picture.
        first, seen: the part of the picture that it shows.
        total: length of the picture.
    """

    input_length: int
    start: int
    length: int
    first: int
    seen: int
    total: int


class PictureArea(NamedTuple):
    """Where a picture lies in the model's input.

    Attributes:
        input_size: (height, width) of the input in pixels, with what is filled.
        rows, columns: see `Span`.
    """

    input_size: tuple[int, int]
    rows: Span
    columns: Span

    def cut(self, maps: torch.Tensor) -> torch.Tensor:
        """The picture's part of maps (batch_size, channels, height, width) of the whole input, at any resolution.

        Where that is all of it, the maps stay as they are; else they are resized to the input first (bilinear).
        """
        rows, columns = self.rows, self.columns
        if (rows.length, columns.length) == self.input_size:
            return maps
        if maps.shape[-2:] != self.input_size:
            maps = F.interpolate(maps, size=self.input_size, mode="bilinear")
        return maps[..., rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]

    def whole(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., rows.seen, columns.seen) of what the model saw -> (..., height, width) of the whole picture.

        Pixels beyond get the value of the nearest one.
        """
        for dim, span in ((-2, self.rows), (-1, self.columns)):
            if span.seen < span.total:
                nearest = torch.arange(span.total, device=maps.device) - span.first
                maps = maps.index_select(dim, nearest.clamp(0, span.seen - 1))
        return maps


def label_maps(logits: torch.Tensor, area: PictureArea, threshold: float = 0.5) -> torch.Tensor:
    """(batch_size, num_labels, h, w) logits of the model's input -> (batch_size, height, width) int64 class ids of the
    picture that lies there; `threshold` as in `labels_of_logits`."""
    return area.whole(resized_label_maps(area.cut(logits), (area.rows.seen, area.columns.seen), threshold))


def resized_label_maps(logits: torch.Tensor, size: tuple[int, int], threshold: float = 0.5) -> torch.Tensor:
    """Classes of logits that are resized (bilinear), without all classes at that size in memory.

    Args:
        logits: (batch_size, num_labels, h, w).
        size: (height, width) of the result.
        threshold: as in `labels_of_logits`.

    Returns:
        (batch_size, height, width) int64: those of `labels_of_logits(interpolate(logits, size))`.
    """
    batch_size, num_labels = logits.shape[:2]
    in_half = logits.dtype in (torch.float16, torch.bfloat16)
    if in_half and num_labels > 1 and batch_size * num_labels * math.prod(size) > STRIP:
        return _resized_label_maps_by_class(logits, size)
    labels = torch.empty(len(logits), *size, dtype=torch.int64, device=logits.device)
    for columns, strip in resized_strips(logits, size):
        labels[..., columns] = labels_of_logits(strip, threshold)
    return labels


def resized_strips(
    logits: torch.Tensor, size: tuple[int, int], tallest: int = 0
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits resized (bilinear), some columns at a time.

    Rows are interpolated first, then columns: the sums of doing both at once, in the same order.

    Args:
        logits: (batch_size, num_labels, h, w) float32 or float64.
        size: (height, width) of the whole result.
        tallest: largest h of all logits whose strips are to have the same columns.

    Yields:
        The columns, and their logits (batch_size, num_labels, height, columns).
    """
    batch_size, num_labels, rows, columns = logits.shape
    height, width = size
    count = max(STRIP // (batch_size * num_labels * max(height, rows, tallest)), 1)
    # A label map takes as much as two or three classes; the backend has ways of its own for so few.
    if count >= width or num_labels <= 3:
        yield slice(0, width), _resized(logits, size)
        return
    # As many columns at a time as the logits have: no more memory than those take.
    group = count * math.ceil(columns / count)
    for start in range(0, width, group):
        stop = min(start + group, width)
        across = logits[..., start:stop] if columns == width else _across(logits, width, start, stop)
        for first in range(start, stop, count):
            last = min(first + count, stop)
            strip = across[..., first - start : last - start].contiguous()
            yield slice(first, last), _resized(strip, (height, last - first))


def _across(logits: torch.Tensor, width: int, start: int, stop: int) -> torch.Tensor:
    """Columns of logits resized along the rows."""
    rows = logits.shape[-2]
    classes = (_resized(one, (rows, width))[..., start:stop] for one in logits.split(1, dim=1))
    across = logits.new_empty(*logits.shape[:3], stop - start)
    for index, one in enumerate(classes):
        across[:, index] = one[:, 0]
    return across


def _resized_label_maps_by_class(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """For half precision, whose sums are rounded once: rows and columns one after the other would round twice."""
    layout = torch.channels_last if logits.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    # Four or more: the backend has another way for fewer where the classes lie side by side in memory.
    first, *others = logits.tensor_split(max(logits.shape[1] // 4, 1), dim=1)
    best, labels = _resized(first.contiguous(memory_format=layout), size).max(1)
    index = first.shape[1]
    for some in others:
        scores, classes = _resized(some.contiguous(memory_format=layout), size).max(1)
        labels = torch.where(scores > best, classes + index, labels)
        best = torch.maximum(best, scores)
        index += some.shape[1]
    return labels


def _resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear")


def _span(total: int, resized: int, crop: int | None) -> Span:
    """A picture of `total` pixels that is resized, then cropped or filled around its centre, as the backend does."""
    if crop is None:
        return Span(resized, 0, resized, 0, total, total)
    if crop >= resized:
        return Span(crop, math.ceil((crop - resized) / 2), resized, 0, total, total)
    cut = (resized - crop) // 2
    first = round(cut * total / resized)
    return Span(crop, 0, crop, first, max(round((cut + crop) * total / resized) - first, 1), total)


class AiluRusImageProcessor(PilBackend):
    """Turns images, and label maps if given, into model inputs, and logits into label maps.

    By default images keep their size: the models take any height and width. Images of different sizes go into one batch
    only with `do_resize=True` and a fixed `size`, or with `do_pad=True`.
    """

    valid_kwargs = AiluRusImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 512}
    default_to_square = False
    do_convert_rgb = True
    do_resize = False
    do_rescale = True
    do_normalize = True
    do_reduce_labels = False
    binary_threshold = 0.5
    ignore_index = IGNORE_INDEX
    rescale_factor = 1 / 255
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def __init__(self, **kwargs: Unpack[AiluRusImageProcessorKwargs]):
        super().__init__(**kwargs)
        _check_numbers(vars(self))

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[AiluRusImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: one image or a list: PIL images of any mode, or uint8 arrays or tensors in either channel order.
            segmentation_maps: label maps (height, width) of the same sizes, integers of at most 32 bits. They are
                resized with nearest neighbours, and are `ignore_index` where the image is filled.
            kwargs: any setting of the processor, for this call; `return_tensors="pt"` for tensors.

        Returns:
            `pixel_values` (batch_size, 3, height, width) float32 and, with label maps, `labels` (batch_size, height,
            width) int64.

        Raises:
            ValueError: an image has NaN or infinite pixels, or a setting makes such pixels; or a label map holds
                colours or fractions.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def convert_to_rgb(self, image: Any, input_data_format: ChannelDimension | None = None) -> np.ndarray:
        """As the backend does, greys of 16 bits scaled."""
        if get_image_type(image) == ImageType.PIL and image.mode.startswith("I"):
            return np.repeat(eight_bits(np.asarray(image))[..., None], 3, axis=-1)
        return super().convert_to_rgb(image, input_data_format=input_data_format)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        settings = {**kwargs, "return_tensors": None}
        _check_numbers(settings)
        prepared = self._prepare_image_like_inputs(
            images=images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format
        )
        for index, image in enumerate(prepared):
            if not np.isfinite(image).all():
                raise ValueError(f"images must have finite pixels, got NaN or infinity in image {index}")
        data = {"pixel_values": self._preprocess(prepared, **settings)["pixel_values"]}
        if segmentation_maps is not None:
            data["labels"] = self._prepare_labels(segmentation_maps, settings)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _prepare_labels(self, segmentation_maps: ImageInput, settings: dict[str, Any]) -> list[np.ndarray]:
        maps = self._prepare_image_like_inputs(
            images=segmentation_maps,
            expected_ndims=2,
            do_convert_rgb=False,
            input_data_format=ChannelDimension.FIRST,
        )
        ignore_index = settings["ignore_index"]
        if settings["do_reduce_labels"]:
            maps = [reduce_labels(labels, ignore_index) for labels in maps]
        settings = {
            **settings,
            "resample": PILImageResampling.NEAREST,
            "do_rescale": False,
            "do_normalize": False,
        }
        maps = [_to_bytes(labels, ignore_index) for labels in maps]
        return [_from_bytes(labels, ignore_index) for labels in self._preprocess(maps, **settings)["pixel_values"]]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        **settings: Unpack[AiluRusImageProcessorKwargs],
    ) -> list[torch.Tensor]:
        """Label maps from logits.

        Args:
            outputs: a model output with `logits` (batch_size, num_labels, height, width). Those of one channel are
                class 1 where their sigmoid is above `binary_threshold`, else 0.
            target_sizes: (height, width) of each map in pixels, those of the pictures that were prepared together. What
                the processor filled is cut off, then the logits are resized before the classes are compared. Pixels
                that a centre crop has cut off get the class of the nearest one that is left. None keeps the logits'
                size.
            settings: those of the call that prepared the pictures, where they differ from the processor's.

        Returns:
            One (height, width) int64 tensor of class ids per image.

        Raises:
            ValueError: `target_sizes` has another length than the batch.
        """
        logits, threshold = outputs.logits, settings.get("binary_threshold", self.binary_threshold)
        if target_sizes is None:
            return list(labels_of_logits(logits, threshold))
        if len(target_sizes) != len(logits):
            raise ValueError(f"target_sizes must have one size per image, {len(logits)}, got {len(target_sizes)}")
        areas = self.picture_areas([(int(height), int(width)) for height, width in target_sizes], **settings)
        if settings.get("do_pad", self.do_pad):
            # Some of a batch alone: the largest picture may not be among them.
            height, width = logits.shape[-2:]
            areas = [
                area._replace(input_size=(max(area.input_size[0], height), max(area.input_size[1], width)))
                for area in areas
            ]
        return [
            label_maps(image_logits[None], area, threshold)[0] for image_logits, area in zip(logits, areas, strict=True)
        ]

    def picture_areas(
        self, sizes: list[tuple[int, int]], **settings: Unpack[AiluRusImageProcessorKwargs]
    ) -> list[PictureArea]:
        """Where pictures of these (height, width) in pixels lie in the model's input, prepared in one call.

        Args:
            sizes: of the pictures.
            settings: those of the call, where they differ from the processor's.
        """
        names = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size", "default_to_square")
        chosen = self._standardize_kwargs(**{name: settings.get(name, getattr(self, name, None)) for name in names})
        spans = [self._spans(size, chosen) for size in sizes]
        if chosen["do_pad"] and chosen["pad_size"]:
            inputs = [(chosen["pad_size"].height, chosen["pad_size"].width)] * len(sizes)
        else:
            inputs = [(rows.input_length, columns.input_length) for rows, columns in spans]
            if chosen["do_pad"]:
                inputs = [(max(height for height, _ in inputs), max(width for _, width in inputs))] * len(sizes)
        return [
            PictureArea(input_size, rows, columns) for input_size, (rows, columns) in zip(inputs, spans, strict=True)
        ]

    def _spans(self, size: tuple[int, int], settings: dict[str, Any]) -> tuple[Span, Span]:
        resized = size
        if settings["do_resize"]:
            # The backend's own arithmetic: it has several kinds of sizes.
            blank = np.zeros((1, *size), dtype=np.uint8)
            resized = self.resize(blank, settings["size"], PILImageResampling.NEAREST).shape[-2:]
        crop = (None, None)
        if settings["do_center_crop"]:
            crop = (settings["crop_size"].height, settings["crop_size"].width)
        rows, columns = (_span(*axis) for axis in zip(size, resized, crop, strict=True))
        if (rows.seen, columns.seen) != size:
            logger.warning_once(
                "do_center_crop cuts pictures off: the pixels beyond get the class of the nearest one that is left. "
                "With do_center_crop=False the model sees whole pictures."
            )
        return rows, columns


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse settings that turn every picture into the same one, or into NaN.

    Raises:
        ValueError: a mean is not finite, or a standard deviation or the factor of rescaling is not finite and above 0.
    """
    for name, above_zero in (("image_mean", False), ("image_std", True), ("rescale_factor", True)):
        value = settings.get(name)
        try:
            numbers = np.asarray(0.5 if value is None else value, dtype=np.float64)
        except (TypeError, ValueError):
            numbers = np.array(np.nan)
        if not np.isfinite(numbers).all() or (above_zero and (numbers <= 0).any()):
            raise ValueError(f"{name} must be finite{' and above 0' if above_zero else ''}, got {value!r}")


__all__ = ["AiluRusImageProcessor"]
