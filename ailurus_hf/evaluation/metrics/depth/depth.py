"""Errors of predicted depth."""

from ailurus_hf.evaluation import DepthErrors
from ailurus_hf.evaluation.streaming import StreamingMetric


class Depth(StreamingMetric):
    """Settings: `min_depth=1e-3`, `max_depth=None`, `align=None`, "median", "least_squares" or "disparity"."""

    accumulator = DepthErrors
    value_type = "float32"
