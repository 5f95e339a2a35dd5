"""The loss, right under gradient accumulation and on several processes; weights for rare classes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.labelled import LabelledImage
from ..modeling.label_maps import binary_cross_entropy

TINY = torch.finfo(torch.float32).tiny

__all__ = ["SegmentationLoss", "class_weights", "count_labels"]


class SegmentationLoss:
    """Cross entropy over the pixels that count; `compute_loss_func` of `transformers.Trainer`.

    Logits of one channel are the foreground's, class 1, and the cross entropy is binary.

    Args:
        ignore_index: label of pixels that do not count.
        weight: (num_labels,) weight of each class, of background and foreground with one channel; None weighs all
            alike.
    """

    def __init__(self, ignore_index: int = 255, weight: Tensor | None = None) -> None:
        self.ignore_index = ignore_index
        self.weight = weight

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """Loss of one micro-batch.

        Args:
            outputs: model output with `logits` (B, num_labels, h, w); smaller ones are resized to the labels.
            labels: (B, H, W) int64.
            num_items_in_batch: what `total_weight` gives for all micro-batches of the step, so that their losses add
                up to the mean over the step's pixels; None takes the mean over this one.
        """
        weight = None if self.weight is None else self.weight.to(outputs.logits.device, torch.float32)
        logits = outputs.logits.float()
        if logits.shape[-2:] != labels.shape[-2:]:
            logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        # "mean" would divide by this micro-batch's pixels, and a step of several would weigh them by how few they are.
        if logits.shape[1] == 1:
            losses, counted = binary_cross_entropy(logits, labels, self.ignore_index)
            loss = (losses if weight is None else losses * weight[torch.where(counted, labels, 0)]).sum()
        else:
            loss = F.cross_entropy(logits, labels, weight, ignore_index=self.ignore_index, reduction="sum")
        total = self.total_weight(labels) if num_items_in_batch is None else num_items_in_batch
        # Where no pixel counts the sum is 0, and so is the loss.
        return loss / torch.as_tensor(total, dtype=loss.dtype, device=loss.device).clamp(min=TINY)

    def total_weight(self, labels: Tensor) -> Tensor:
        """Sum of the weights of the pixels that count, a scalar on the labels' device: without weights their number."""
        counted = labels != self.ignore_index
        if self.weight is None:
            return counted.sum()
        classes = torch.where(counted, labels, 0)  # no boolean indexing: it would wait for the device
        return (self.weight.to(labels.device)[classes] * counted).sum()


def count_labels(samples: Iterable[LabelledImage], num_labels: int, ignore_index: int = 255) -> np.ndarray:
    """Pixels of each class over all samples, (num_labels,) int64."""
    counts = np.zeros(num_labels, dtype=np.int64)
    for sample in samples:
        labels = sample.labels[sample.labels != ignore_index]
        counts += np.bincount(labels, minlength=num_labels)[:num_labels]
    return counts


def class_weights(counts: np.ndarray, power: float = 0.5) -> Tensor:
    """Weights that make rare classes count more: (median count / count) ** power, 1 for classes that never occur.

    Power 1 is median-frequency balancing (Eigen and Fergus, ICCV 2015, section 6.3, with counts over all pictures);
    smaller powers are milder.

    Args:
        counts: (num_labels,) pixels of each class.
        power: between 0 (all alike) and 1.

    Returns:
        (num_labels,) float32.

    Raises:
        ValueError: no pixel is counted, or `power` is outside 0 to 1.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power must be between 0 and 1, got {power}")
    seen = counts > 0
    if not seen.any():
        raise ValueError("counts must hold at least one pixel of one class")
    weights = np.ones(len(counts))
    weights[seen] = (np.median(counts[seen]) / counts[seen]) ** power
    return torch.tensor(weights, dtype=torch.float32)
