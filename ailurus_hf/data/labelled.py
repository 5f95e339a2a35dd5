"""What every source of training and evaluation data gives: a picture with the class of each pixel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..modeling.image_processing_ailurus import IGNORE_INDEX, reduce_labels

__all__ = ["LabelRule", "LabelledImage"]


class LabelledImage(NamedTuple):
    """A picture and its label map.

    Attributes:
        image: RGB picture.
        labels: (height, width) int64, class of every pixel, or the ignore index.
        name: what to call the sample in messages, such as the path of its label file.
    """

    image: Image.Image
    labels: np.ndarray
    name: str


@dataclass
class LabelRule:
    """How the numbers in label files become classes.

    Args:
        num_labels: number of classes; None leaves the values unchecked.
        ignore_index: value of pixels that do not count, in the result and, unless reduced or mapped, in the files;
            where it is negative, 255 in the files does not count either.
        reduce_labels: subtract 1 from every value and turn 0 and 255 into `ignore_index`: for data sets, such as
            ADE20K, whose label 0 is no class. The image processor's `do_reduce_labels` is the same rule.
        label_ids: value in the files -> class, for data sets, such as Cityscapes, whose files number more than the
            classes; values that it does not name become `ignore_index`.

    Raises:
        ValueError: `reduce_labels` together with `label_ids`, or `ignore_index` is one of the classes.
    """

    num_labels: int | None = None
    ignore_index: int = 255
    reduce_labels: bool = False
    label_ids: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        if self.reduce_labels and self.label_ids is not None:
            raise ValueError("reduce_labels and label_ids both renumber the labels; give one of them")
        if self.num_labels is not None and 0 <= self.ignore_index < self.num_labels:
            raise ValueError(f"ignore_index must not be one of the {self.num_labels} classes, got {self.ignore_index}")

    def __call__(self, labels: np.ndarray, name: str) -> np.ndarray:
        """Classes of a label map (height, width) of integers, as int64.

        Raises:
            ValueError: a value is neither a class nor `ignore_index`; the message names the sample.
        """
        labels = labels.astype(np.int64)
        if self.label_ids is not None:
            labels = self._mapped(labels, self.label_ids)
        elif self.reduce_labels:
            labels = reduce_labels(labels, self.ignore_index, self.num_labels)
        elif self.ignore_index < 0 and (self.num_labels or 0) <= IGNORE_INDEX:
            # No 8-bit file can hold a negative number: what does not count is 255 there.
            labels = np.where(labels == IGNORE_INDEX, self.ignore_index, labels)
        self._check(labels, name)
        return labels

    def _mapped(self, labels: np.ndarray, label_ids: Mapping[int, int]) -> np.ndarray:
        # A table up to the largest value there is: one lookup for the whole map, in place of one pass for each class.
        table = np.full(max(labels.max(initial=0), *label_ids, 0) + 1, self.ignore_index, dtype=np.int64)
        for value, label in label_ids.items():
            table[value] = label
        return np.where(labels < 0, self.ignore_index, table[labels])

    def _check(self, labels: np.ndarray, name: str) -> None:
        if self.num_labels is None:
            return
        outside = ((labels < 0) | (labels >= self.num_labels)) & (labels != self.ignore_index)
        if outside.any():
            wrong = np.unique(labels[outside])
            shown = ", ".join(map(str, wrong[:5])) + (" ..." if wrong.size > 5 else "")
            raise ValueError(
                f"{name} has labels outside the classes: {shown}; allowed are 0 to {self.num_labels - 1} and "
                f"ignore_index={self.ignore_index}. Set num_labels, ignore_index, or reduce_labels for files whose "
                "label 0 is no class"
            )
