"""Evaluation: predicting whole pictures, metrics that stream, several budgets side by side."""

from typing import TYPE_CHECKING, Any

from .accumulator import Accumulator
from .boundary import BoundaryScore
from .depth import DepthErrors
from .inference import ClusterMap, Segmentation, class_scores, segment_image
from .loop import BudgetResult, EvaluationReport, evaluate_segmentation
from .segmentation import Agreement, ConfusionMatrix
from .sliding_window import sliding_window_logits
from .trainer import SegmentationMetrics, predictions_from_logits

if TYPE_CHECKING:
    from .streaming import load_metric as load_metric

__all__ = [
    "Accumulator",
    "Agreement",
    "BoundaryScore",
    "BudgetResult",
    "ClusterMap",
    "ConfusionMatrix",
    "DepthErrors",
    "EvaluationReport",
    "Segmentation",
    "SegmentationMetrics",
    "class_scores",
    "evaluate_segmentation",
    "load_metric",
    "predictions_from_logits",
    "segment_image",
    "sliding_window_logits",
]


def __getattr__(name: str) -> Any:
    # `evaluate` brings `datasets` along and takes a second to import; whoever does not load its metrics need not wait.
    if name == "load_metric":
        from .streaming import load_metric

        return load_metric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
