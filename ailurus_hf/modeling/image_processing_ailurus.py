"""Image processor for AiluRus models. Needs Pillow and numpy, no torchvision."""

from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from .label_maps import labels_of_logits

IGNORE_LABEL = 255  # what label reduction turns the background into


class AiluRusImageProcessorKwargs(ImagesKwargs, total=False):
    """
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether to subtract 1 from every label and turn 0 into 255: for data sets, such as ADE20K, whose label 0 is no
        class.
    binary_threshold (`float`, *optional*, defaults to `self.binary_threshold`):
        Probability above which a pixel is foreground, for models with one channel; as in the model's configuration.
    """

    do_reduce_labels: bool
    binary_threshold: float


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
            segmentation_maps: label maps (height, width) of the same sizes, resized with nearest neighbours.
            kwargs: any setting of the processor, for this call; `return_tensors="pt"` for tensors.

        Returns:
            `pixel_values` (batch_size, 3, height, width) float32 and, with label maps, `labels` (batch_size, height,
            width) int64.

        Raises:
            ValueError: an image has NaN or infinite pixels, or a setting makes such pixels.
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
        if settings["do_reduce_labels"]:
            maps = [np.where(labels == 0, IGNORE_LABEL, labels - 1).astype(labels.dtype) for labels in maps]
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
            outputs: a model output with `logits` (batch_size, num_labels, height, width). Those of one channel are
                class 1 where their sigmoid is above `binary_threshold`, else 0.
            target_sizes: (height, width) of each map in pixels; the logits are resized to it before the classes are
                compared. None keeps their size.

        Returns:
            One (height, width) int64 tensor of class ids per image.

        Raises:
            ValueError: `target_sizes` has another length than the batch.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(labels_of_logits(logits, self.binary_threshold))
        if len(target_sizes) != len(logits):
            raise ValueError(f"target_sizes must have one size per image, {len(logits)}, got {len(target_sizes)}")
        sizes = [tuple(int(side) for side in size) for size in target_sizes]
        return [
            labels_of_logits(F.interpolate(image_logits[None], size=size, mode="bilinear")[0], self.binary_threshold)
            for image_logits, size in zip(logits, sizes, strict=True)
        ]


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
