"""Segmentation quality from counts: no label maps or logits are kept."""

import torch
from torch import Tensor

__all__ = ["ConfusionMatrix"]


class ConfusionMatrix:
    """Counts of (true class, predicted class) pairs, added up image by image.

    Args:
        num_labels: number of classes.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add label maps of any shape, integers, both of the same shape.

        Raises:
            ValueError: the shapes differ, or a label is neither a class nor `ignore_index`.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions and labels must have the same shape, got {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}"
            )
        counted = labels != self.ignore_index
        labels, predictions = labels[counted].long().cpu(), predictions[counted].long().cpu()
        for name, values in (("labels", labels), ("predictions", predictions)):
            if values.numel() and not 0 <= values.min() <= values.max() < self.num_labels:
                raise ValueError(
                    f"{name} must be classes from 0 to {self.num_labels - 1}"
                    f"{f' or ignore_index={self.ignore_index}' if name == 'labels' else ''}, got values from "
                    f"{int(values.min())} to {int(values.max())}"
                )
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
