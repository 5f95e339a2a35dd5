"""Evaluation: predicting whole pictures, metrics that stream, several budgets side by side."""

from .accumulator import Accumulator, load_metric
from .boundary import BoundaryScore
from .depth import DepthErrors
from .inference import ClusterMap, Segmentation, class_scores, segment_image
from .loop import BudgetResult, EvaluationReport, evaluate_segmentation
from .segmentation import Agreement, ConfusionMatrix
from .sliding_window import sliding_window_logits
from .trainer import SegmentationMetrics, predictions_from_logits

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
