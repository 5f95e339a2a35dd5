"""Segmentation quality from counts: no label maps or logits are kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modeling.label_maps import class_names
from .accumulator import Accumulator

__all__ = ["Agreement", "ConfusionMatrix", "check_label_maps", "check_shapes"]


class ConfusionMatrix(Accumulator):
    """Counts of (true class, predicted class) pairs, added up image by image.

    Args:
        num_labels: number of classes; 1, as of a model with one channel, counts background and foreground.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        num_labels = max(num_labels, 2)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add label maps of any shape, integers, both of the same shape.

        Raises:
            ValueError: the shapes differ, or a label is neither a class nor `ignore_index`.
        """
        check_label_maps(predictions, labels, self.num_labels, self.ignore_index)
        counted = labels != self.ignore_index
        labels, predictions = labels[counted].long().cpu(), predictions[counted].long().cpu()
        # A pair of classes as one number with two digits to the base num_labels: row and column of the matrix.
        pairs = torch.bincount(labels * self.num_labels + predictions, minlength=self.num_labels**2)
        self.counts += pairs.view_as(self.counts)

    def iou(self) -> Tensor:
        """Intersection over union of every class, (num_labels,) float64; NaN for classes that never occur."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    def mean_iou(self) -> float:
        """Mean over the classes that occur in labels or predictions; NaN if none does."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels whose class is right; NaN if there are none."""
        return float(self.counts.diagonal().sum() / self.counts.sum())

    def class_accuracy(self) -> Tensor:
        """Share of each class's pixels that are right, (num_labels,) float64; NaN for classes without pixels."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    def compute(self) -> dict[str, float]:
        """`mean_iou`, `pixel_accuracy`, and `mean_accuracy` over the classes in the labels."""
        return {
            "mean_iou": self.mean_iou(),
            "pixel_accuracy": self.pixel_accuracy(),
            "mean_accuracy": float(self.class_accuracy().nanmean()),
        }

    def by_class(self) -> dict[str, Tensor]:
        """`iou`, see there."""
        return {"iou": self.iou()}

    def summary(self, id2label: Mapping[int, str] | None = None) -> dict[str, Any]:
        """What `compute` gives and, for each class by its name or number, `iou` and `accuracy`; NaN is None."""
        names = class_names(id2label, self.num_labels)
        by_class = {"iou": self.iou(), "accuracy": self.class_accuracy()}
        return {
            **{name: number_or_none(value) for name, value in self.compute().items()},
            **{
                score: dict(zip(names, map(number_or_none, values.tolist()), strict=True))
                for score, values in by_class.items()
            },
        }


class Agreement(Accumulator):
    """Share of pixels for which two models give the same class, from counts."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64)  # equal, all

    def update(self, predictions: Tensor, references: Tensor) -> None:
        """Add label maps of any shape, both of the same.

        Raises:
            ValueError: the shapes differ.
        """
        check_shapes(predictions, references, "references")
        equal = (predictions.cpu() == references.cpu()).sum()
        self.counts += torch.tensor([int(equal), predictions.numel()])

    def share(self) -> float:
        """Between 0 and 1; NaN before the first pixel."""
        return float(self.counts[0] / self.counts[1])

    def compute(self) -> dict[str, float]:
        """`agreement`, see `share`."""
        return {"agreement": self.share()}


def check_label_maps(predictions: Tensor, labels: Tensor, num_labels: int, ignore_index: int) -> None:
    """Check that label maps have the same shape and hold classes only, where the labels are not ignored.

    Raises:
        ValueError: they do not.
    """
    check_shapes(predictions, labels, "labels")
    counted = labels != ignore_index
    for name, values in (("labels", labels[counted]), ("predictions", predictions[counted.to(predictions.device)])):
        if values.numel() and not 0 <= values.min() <= values.max() < num_labels:
            raise ValueError(
                f"{name} must be classes from 0 to {num_labels - 1}"
                f"{f' or ignore_index={ignore_index}' if name == 'labels' else ''}, got values from "
                f"{int(values.min())} to {int(values.max())}"
            )


def check_shapes(predictions: Tensor, labels: Tensor, name: str) -> None:
    """Check that two maps have the same shape; `name` is what the second one is called in the ValueError."""
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and {name} must have the same shape, got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value
