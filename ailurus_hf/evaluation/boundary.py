"""How well the contours of the classes are met."""

import math

import numpy as np
import torch
from torch import Tensor

from ..utils.extras import needs_extra
from .accumulator import Accumulator
from .segmentation import check_label_maps, check_shapes

__all__ = ["BoundaryScore"]


class BoundaryScore(Accumulator):
    """Boundary F-score (Csurka et al., BMVC 2013), from counts that are added up picture by picture.

    The boundary of a class are its pixels that have a pixel of another class above, below, left or right. Precision is
    the share of the prediction's boundary pixels with a true boundary pixel of that class within `tolerance`, recall
    the share of the true ones with a predicted one; the F-score is their harmonic mean. Counts are added over all
    pictures before a class's score is taken, and the mean is over classes. Pixels that are ignored have no boundary,
    nor do their neighbours because of them.

    Args:
        num_labels: number of classes; 1, as of a model with one channel, counts background and foreground.
        ignore_index: label of pixels that do not count.
        tolerance: largest distance that counts as met, as a share of the picture's diagonal; at least one pixel.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, tolerance: float = 0.0075) -> None:
        if tolerance < 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        num_labels = max(num_labels, 2)
        self.num_labels, self.ignore_index, self.tolerance = num_labels, ignore_index, tolerance
        # Rows: predicted boundary pixels that are met, all predicted, true ones that are met, all true.
        self.counts = torch.zeros(4, num_labels, dtype=torch.int64)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add one picture.

        Args:
            predictions: (height, width) integers, the predicted classes.
            labels: (height, width) integers, the true ones.

        Raises:
            ValueError: as in `ConfusionMatrix.update`, or the maps are not two-dimensional.
        """
        check_shapes(predictions, labels, "labels")
        if labels.ndim != 2:
            raise ValueError(f"predictions and labels must both be (height, width), got {tuple(labels.shape)}")
        labels = labels.long().cpu()
        # Or the prediction would have boundaries, and misses, where nobody knows the truth.
        predictions = torch.where(labels == self.ignore_index, self.ignore_index, predictions.long().cpu())
        check_label_maps(predictions, labels, self.num_labels, self.ignore_index)
        radius = max(self.tolerance * math.hypot(*labels.shape), 1)
        predicted, true = self._boundaries(predictions), self._boundaries(labels)
        found, met = _count_near(true, predicted, radius), _count_near(predicted, true, radius)
        self.counts += torch.stack([met, predicted.flatten(1).sum(1), found, true.flatten(1).sum(1)])

    def f_score(self) -> Tensor:
        """F-score of every class, (num_labels,) float64; NaN for classes without boundary in labels and predictions."""
        met, predicted, found, true = self.counts.double()
        # 2PR / (P + R) with P = met / predicted and R = found / true; 0 where one of them has no boundary at all.
        precision, recall = met / predicted.clamp(min=1), found / true.clamp(min=1)
        score = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(predicted + true > 0, score, torch.nan)

    def mean_f_score(self) -> float:
        """Mean over the classes that have a boundary; NaN if none does."""
        return float(self.f_score().nanmean())

    def compute(self) -> dict[str, float]:
        """`boundary_f`, the mean over classes."""
        return {"boundary_f": self.mean_f_score()}

    def by_class(self) -> dict[str, Tensor]:
        """`boundary_f`, see `f_score`."""
        return {"boundary_f": self.f_score()}

    def _boundaries(self, labels: Tensor) -> Tensor:
        """(num_labels, height, width) bool, the boundary pixels of every class."""
        edges = torch.zeros_like(labels, dtype=torch.bool)
        # Each pixel against the one below, then against the one to the right; both of an unequal pair are boundary.
        for first, second in (
            ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
            ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ):
            counted = (labels[first] != self.ignore_index) & (labels[second] != self.ignore_index)
            differ = counted & (labels[first] != labels[second])
            edges[first] |= differ
            edges[second] |= differ
        classes = torch.arange(self.num_labels).view(-1, 1, 1)
        return (labels == classes) & edges


def _count_near(masks: Tensor, others: Tensor, radius: float) -> Tensor:
    """How many pixels of every class's mask have one of its other mask within `radius`.

    Args:
        masks, others: (num_labels, height, width) bool.
        radius: in pixels.

    Returns:
        (num_labels,) int64.
    """
    with needs_extra("eval", "boundary scores"):
        from scipy.ndimage import distance_transform_edt

    counts = torch.zeros(len(masks), dtype=torch.int64)
    for label, (mask, other) in enumerate(zip(masks.numpy(), others.numpy(), strict=True)):
        if mask.any() and other.any():
            # Squares of distances between pixels are integers; their roots are rounded.
            squares = np.rint(distance_transform_edt(~other)[mask] ** 2)
            counts[label] = int((squares <= radius**2).sum())
    return counts
