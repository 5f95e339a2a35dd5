"""Share of pixels with the class that a reference model, such as the dense one, gives them."""

from typing import Any

from torch import Tensor

from ailurus_hf.evaluation.segmentation import Agreement
from ailurus_hf.evaluation.streaming import StreamingMetric


class AgreementWithDense(StreamingMetric):
    """No settings: `references` are the other model's label maps, and every pixel counts."""

    about = "Share of pixels for which the predictions of two models are equal."

    def reset(self) -> None:
        self.counts = Agreement()

    def update(self, prediction: Tensor, reference: Tensor) -> None:
        self.counts.update(prediction, reference)

    def result(self) -> dict[str, Any]:
        return {"agreement": self.counts.share()}
