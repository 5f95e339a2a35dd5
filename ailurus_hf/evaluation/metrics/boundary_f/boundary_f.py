"""Boundary F-score, mean and of every class."""

from ailurus_hf.evaluation import BoundaryScore
from ailurus_hf.evaluation.streaming import StreamingMetric


class BoundaryF(StreamingMetric):
    """Settings: `num_labels`, `ignore_index=255`, `tolerance=0.0075` of the picture's diagonal, `id2label=None`."""

    accumulator = BoundaryScore
