"""Other projects' ways from a picture to the pixel values of their models, written out, for verification."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the middle, take the mean off, divide; called with a picture.

    It shares no code with the image processor of this package, so that a processor's settings can be checked
    against it.

    Args:
        mean, std: of each channel, in the order that the model takes them in.
        top: what the largest value of a pixel, 255, becomes before mean and std are applied.
        bgr: whether the model takes the channels as blue, green, red.
        shortest_edge: length in pixels that the shorter side is resized to; None leaves the size.
        resample: Pillow's number of the filter that resizes.
        crop: (height, width) of the middle that is cut out; None takes all.
    """

    mean: Sequence[float]
    std: Sequence[float]
    top: float = 1.0
    bgr: bool = False
    shortest_edge: int | None = None
    resample: int = Image.Resampling.BILINEAR
    crop: tuple[int, int] | None = None

    def __call__(self, picture: Tensor) -> Tensor:
        """An RGB picture (3, height, width) uint8 -> pixel values (1, 3, rows, columns) float32, in the model's order.

        Raises:
            ValueError: the middle to cut out is larger than the picture.
        """
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        if self.shortest_edge is not None:
            shorter, longer = sorted(image.size)
            sides = {shorter: self.shortest_edge, longer: int(self.shortest_edge * longer / shorter)}
            image = image.resize((sides[image.width], sides[image.height]), self.resample)
        values = np.asarray(image, dtype=np.float64)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(values.shape, self.crop, strict=False))
            if min(top, left) < 0:
                raise ValueError(f"the middle to cut out, {self.crop}, is larger than the picture {values.shape[:2]}")
            values = values[top : top + self.crop[0], left : left + self.crop[1]]
        values = values[..., ::-1] if self.bgr else values
        values = (values * (self.top / 255) - np.array(self.mean)) / np.array(self.std)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32))[None]
