"""Segmentation metrics for a plain `transformers.Trainer`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..modeling.image_processing_ailurus import resized_label_maps
from ..modeling.label_maps import class_names, labels_of_logits
from .segmentation import ConfusionMatrix

__all__ = ["SegmentationMetrics", "predictions_from_logits"]


def predictions_from_logits(
    logits: Tensor | tuple[Tensor, ...], labels: Tensor, binary_threshold: float = 0.5
) -> Tensor:
    """`preprocess_logits_for_metrics`: label maps in place of logits, so that Trainer gathers little.

    Args:
        logits: (B, num_labels, h, w), or a tuple whose first entry they are.
        labels: (B, H, W); smaller logits are resized to them, bilinear.
        binary_threshold: probability above which a pixel is class 1, where the logits have one channel.
    """
    scores = logits if isinstance(logits, Tensor) else logits[0]
    if scores.shape[-2:] == labels.shape[-2:]:
        return labels_of_logits(scores, binary_threshold)
    return resized_label_maps(scores.float(), (labels.shape[-2], labels.shape[-1]), binary_threshold)


class SegmentationMetrics:
    """`compute_metrics` with `TrainingArguments(batch_eval_metrics=True)`: counts, no stored predictions.

    Trainer fills label maps of different sizes up to one, across processes along the height only: use
    `ailurus_hf.training.SegmentationTrainer` where pictures differ in size.

    Args:
        num_labels: number of classes; 1, as of a model with one channel, counts background and foreground.
        ignore_index: label of pixels that do not count; Trainer's own filling, -100, never does.
        id2label: names for the classes' IoU, with one channel of the foreground; None leaves it out.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, id2label: Mapping[int, str] | None = None) -> None:
        self.matrix, self.id2label = ConfusionMatrix(num_labels, ignore_index), id2label

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; the scores, and a new start, when `compute_result`."""
        self.add(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))
        if not compute_result:
            return {}
        scores = {"mean_iou": self.matrix.mean_iou(), "pixel_accuracy": self.matrix.pixel_accuracy()}
        if self.id2label is not None:
            names = class_names(self.id2label, self.matrix.num_labels)
            scores |= {f"iou_{name}": iou for name, iou in zip(names, self.matrix.iou().tolist(), strict=True)}
        self.matrix.reset()
        return scores

    # Apart from the call because SegmentationTrainer hands over counts in place of label maps.
    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Add what Trainer gathered: label maps (B, H, W), both with -100 where Trainer filled them."""
        self.matrix.update(predictions, torch.where(labels == -100, self.matrix.ignore_index, labels))
