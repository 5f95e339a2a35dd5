"""Evaluation: predicting whole pictures, sliding-window inference, quality from counts."""

from .inference import Segmentation, segment_image
from .segmentation import ConfusionMatrix
from .sliding_window import sliding_window_logits

__all__ = ["ConfusionMatrix", "Segmentation", "segment_image", "sliding_window_logits"]
