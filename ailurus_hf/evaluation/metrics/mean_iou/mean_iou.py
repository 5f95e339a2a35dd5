"""Mean intersection over union, with IoU and accuracy of every class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ailurus_hf.evaluation.segmentation import ConfusionMatrix
from ailurus_hf.evaluation.streaming import StreamingMetric, named_scores


class MeanIoU(StreamingMetric):
    """Settings: `num_labels`, `ignore_index=255`, `id2label=None` for names in the result."""

    about = (
        "Mean over classes of intersection / union of the pixels, with pixel accuracy, mean accuracy over classes, and "
        "IoU of every class. Classes in neither predictions nor references are left out of the means."
    )

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_labels: int,
        ignore_index: int = 255,
        id2label: Mapping[int, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_labels, self.ignore_index, self.id2label = num_labels, ignore_index, id2label
        super().__init__(config_name, **kwargs)

    def reset(self) -> None:
        self.matrix = ConfusionMatrix(self.num_labels, self.ignore_index)

    def update(self, prediction: Tensor, reference: Tensor) -> None:
        self.matrix.update(prediction, reference)

    def result(self) -> dict[str, Any]:
        return {
            "mean_iou": self.matrix.mean_iou(),
            "pixel_accuracy": self.matrix.pixel_accuracy(),
            "mean_accuracy": float(self.matrix.class_accuracy().nanmean()),
            **named_scores("iou", self.matrix.iou().tolist(), self.id2label),
        }
