"""Errors of predicted depth."""

from typing import Any

from torch import Tensor

from ailurus_hf.evaluation.depth import DepthErrors
from ailurus_hf.evaluation.streaming import StreamingMetric


class Depth(StreamingMetric):
    """Settings: `min_depth=1e-3`, `max_depth=None`, `align=None`, "median" or "least_squares"."""

    about = (
        "abs_rel, rmse, rmse_log and delta1 to delta3 of predicted depth (Eigen et al., Depth map prediction from a "
        "single image using a multi-scale deep network, NeurIPS 2014), of every picture, averaged over pictures."
    )
    value_type = "float32"

    def __init__(
        self,
        config_name: str | None = None,
        *,
        min_depth: float = 1e-3,
        max_depth: float | None = None,
        align: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = (min_depth, max_depth, align)
        super().__init__(config_name, **kwargs)

    def reset(self) -> None:
        self.errors = DepthErrors(*self.settings)

    def update(self, prediction: Tensor, reference: Tensor) -> None:
        self.errors.update(prediction, reference)

    def result(self) -> dict[str, Any]:
        return self.errors.compute()
