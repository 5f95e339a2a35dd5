"""Image processor for AiluRus models. Needs Pillow and numpy, no torchvision."""

from typing import Any, Unpack

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

IGNORE_INDEX = 255  # transformers' own: what reducing labels turns 0 into, and leaves as it is


class AiluRusImageProcessorKwargs(ImagesKwargs, total=False):
    """
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether to subtract 1 from every label and turn 0 into `ignore_index`: for data sets, such as ADE20K, whose label
        0 is no class. Labels of 255 are ignored too, as in transformers.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        Label of pixels that do not count.
    """

    do_reduce_labels: bool
    ignore_index: int


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
    ignore_index = IGNORE_INDEX
    rescale_factor = 1 / 255
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[AiluRusImageProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images.

        Args:
            images: one image or a list: PIL images of any mode, or uint8 arrays or tensors in either channel order.
            segmentation_maps: label maps (height, width) of the same sizes, resized with nearest neighbours.
            kwargs: any setting of the processor, for this call; `return_tensors="pt"` for tensors.

        Returns:
            `pixel_values` (batch_size, 3, height, width) float32 and, with label maps, `labels` (batch_size, height,
            width) int64.

        Raises:
            ValueError: an image has NaN or infinite pixels.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

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
        if settings["do_reduce_labels"]:
            maps = [reduce_labels(labels, settings["ignore_index"]) for labels in maps]
        settings = {
            **settings,
            "resample": PILImageResampling.NEAREST,
            "do_rescale": False,
            "do_normalize": False,
        }
        return [labels[0].astype(np.int64) for labels in self._preprocess(maps, **settings)["pixel_values"]]

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Label maps from logits.

        Args:
            outputs: a model output with `logits` (batch_size, num_labels, height, width).
            target_sizes: (height, width) of each map in pixels; the logits are resized to it before the classes are
                compared. None keeps their size.

        Returns:
            One (height, width) int64 tensor of class ids per image.

        Raises:
            ValueError: `target_sizes` has another length than the batch.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"target_sizes must have one size per image, {len(logits)}, got {len(target_sizes)}")
        sizes = [tuple(int(side) for side in size) for size in target_sizes]
        return [
            F.interpolate(image_logits[None], size=size, mode="bilinear")[0].argmax(0)
            for image_logits, size in zip(logits, sizes, strict=True)
        ]


__all__ = ["AiluRusImageProcessor"]
