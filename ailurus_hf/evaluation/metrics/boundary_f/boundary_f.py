"""Boundary F-score, mean and of every class."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ailurus_hf.evaluation.boundary import BoundaryScore
from ailurus_hf.evaluation.streaming import StreamingMetric, named_scores


class BoundaryF(StreamingMetric):
    """Settings: `num_labels`, `ignore_index=255`, `tolerance=0.0075` of the picture's diagonal, `id2label=None`."""

    about = (
        "F-score of the classes' boundary pixels that are met within a tolerance (Csurka et al., What is a good "
        "evaluation measure for semantic segmentation?, BMVC 2013), counts added over all pictures."
    )

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_labels: int,
        ignore_index: int = 255,
        tolerance: float = 0.0075,
        id2label: Mapping[int, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings, self.id2label = (num_labels, ignore_index, tolerance), id2label
        super().__init__(config_name, **kwargs)

    def reset(self) -> None:
        self.score = BoundaryScore(*self.settings)

    def update(self, prediction: Tensor, reference: Tensor) -> None:
        self.score.update(prediction, reference)

    def result(self) -> dict[str, Any]:
        scores = self.score.f_score().tolist()
        return {"boundary_f": self.score.mean_f_score(), **named_scores("boundary_f", scores, self.id2label)}
