"""From a picture to its label map."""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import PreTrainedModel

from .sliding_window import sliding_window_logits

__all__ = ["Segmentation", "segment_image"]


class Segmentation(NamedTuple):
    """A picture's classes, and how its patches were merged.

    Attributes:
        labels: (height, width) int64, class of every pixel of the picture.
        clusters: (rows, columns) int64, cluster of every patch; None for sliding windows and hierarchical models.
        patch_size: height and width of a patch in pixels of the picture (not whole numbers if it was resized); None
            without clusters.
    """

    labels: np.ndarray
    clusters: np.ndarray | None
    patch_size: tuple[float, float] | None

    @property
    def num_tokens(self) -> int | None:
        """Number of patch tokens that the merged layers run on; None without clusters."""
        return None if self.clusters is None else int(self.clusters.max()) + 1


@torch.no_grad()
def segment_image(
    model: PreTrainedModel, image_processor: Any, image: Image.Image, sliding_window: bool = False
) -> Segmentation:
    """Segment one picture.

    Args:
        model: a segmentation model of this package in evaluation mode, on any device.
        image_processor: its image processor.
        image: an RGB picture of any size.
        sliding_window: predict window by window, with `config.window_size` and `config.window_stride`, and average.

    Raises:
        ValueError: `sliding_window` for a model whose configuration has no `window_size`.
    """
    config = model.config
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    height, width = pixel_values.shape[-2:]
    clusters = patch_size = None
    if sliding_window:
        if getattr(config, "window_size", None) is None:
            raise ValueError("sliding_window needs config.window_size, which this model does not have")
        stride = config.window_stride or config.window_size
        logits = sliding_window_logits(model, pixel_values, config.window_size, stride)
    else:
        output = model(pixel_values)
        logits = output.logits
        if isinstance(output.assignment, torch.Tensor):  # hierarchical models have clusters in every stage
            clusters = output.assignment[0].view(config.patch_grid(height, width)).cpu().numpy()
            patch_size = (config.patch_size * image.height / height, config.patch_size * image.width / width)
    if (height, width) != (image.height, image.width):
        logits = F.interpolate(logits, size=(image.height, image.width), mode="bilinear")
    return Segmentation(logits[0].argmax(0).cpu().numpy(), clusters, patch_size)
