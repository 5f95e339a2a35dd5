"""Video processor for LookupViT models. Needs Pillow and numpy; transformers' own video processors need torchvision."""

from typing import Any, Unpack

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import is_valid_image

from .image_processing_ailurus import AiluRusImageProcessor, AiluRusImageProcessorKwargs


class LookupViTVideoProcessorKwargs(AiluRusImageProcessorKwargs, total=False):
    """
    num_frames (`int`, *optional*, defaults to `self.num_frames`):
        Frames to take from each video, evenly spread over it: the middle ones of as many equal parts. A shorter video
        repeats some. None takes all.
    """

    num_frames: int


class LookupViTVideoProcessor(AiluRusImageProcessor):
    """Turns videos that are decoded already into model inputs: evenly spread frames, each prepared as an image.

    transformers' `AutoVideoProcessor` needs torchvision, so load this class by its name; in a checkpoint that brings
    its code it stands as the image processor, which is what the video-classification pipeline falls back on.
    """

    valid_kwargs = LookupViTVideoProcessorKwargs
    num_frames = None

    def preprocess(  # type: ignore[override]  # videos have no label maps
        self, images: Any, **kwargs: Unpack[LookupViTVideoProcessorKwargs]
    ) -> BatchFeature:
        """Prepare videos.

        Args:
            images: one video or a list. A video is a list of frames, each what `AiluRusImageProcessor` takes as an
                image, or an array or tensor (num_frames, ...) of them.
            kwargs: any setting of the processor, for this call; `return_tensors="pt"` for tensors.

        Returns:
            `pixel_values` (batch_size, num_frames, 3, height, width) float32.

        Raises:
            ValueError: there is no video or an empty one, the videos have different numbers of frames and `num_frames`
                is None, or it is below 1.
        """
        num_frames = kwargs.pop("num_frames", None)
        num_frames = self.num_frames if num_frames is None else num_frames
        videos = [images] if len(images) and is_valid_image(images[0]) and _ndim(images[0]) == 3 else list(images)
        chosen = [_evenly_spread(video, num_frames) for video in videos]
        lengths = {len(video) for video in chosen}
        if len(lengths) != 1:
            raise ValueError(
                f"images must hold videos of one number of frames, got {sorted(lengths) or 'no video'}; num_frames=16 "
                "takes that many of each"
            )
        features = super().preprocess([frame for video in chosen for frame in video], **kwargs)
        pixels = features["pixel_values"]
        shape = (len(chosen), lengths.pop())
        if isinstance(pixels, torch.Tensor | np.ndarray):
            features["pixel_values"] = pixels.reshape(*shape, *pixels.shape[1:])
        else:
            features["pixel_values"] = [pixels[start : start + shape[1]] for start in range(0, len(pixels), shape[1])]
        return features


def _ndim(frame: Any) -> int:
    """Axes of a frame; a picture of Pillow counts as having its channels."""
    return getattr(frame, "ndim", 3)


def _evenly_spread(video: Any, num_frames: int | None) -> list[Any]:
    """The frames in the middle of `num_frames` equal parts; all for None."""
    total = len(video)
    if total == 0 or (num_frames is not None and num_frames < 1):
        raise ValueError(f"num_frames must be at least 1, of a video with frames, got {num_frames} of {total}")
    count = total if num_frames is None else num_frames
    return [video[(2 * index + 1) * total // (2 * count)] for index in range(count)]


__all__ = ["LookupViTVideoProcessor"]
