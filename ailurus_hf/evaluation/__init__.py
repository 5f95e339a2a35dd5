"""Evaluation: predicting whole pictures, metrics that stream, several budgets side by side."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .accumulator import Accumulator
from .boundary import BoundaryScore
from .depth import DepthErrors
from .inference import ClusterMap, Segmentation, class_scores, segment_image
from .segmentation import Agreement, ConfusionMatrix
from .sliding_window import sliding_window_logits
from .trainer import SegmentationMetrics, predictions_from_logits

if TYPE_CHECKING:
    from .loop import BudgetResult, EvaluationReport, evaluate_segmentation
    from .streaming import load_metric

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

# These need packages of the extra `eval`, and `evaluate` takes a second to import: who does without need not wait.
_LATER = {
    "BudgetResult": "loop",
    "EvaluationReport": "loop",
    "evaluate_segmentation": "loop",
    "load_metric": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
