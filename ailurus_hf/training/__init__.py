"""Training: the loss, learning rates and budgets, a Trainer for segmentation."""

from .loss import SegmentationLoss, class_weights, count_labels
from .optimization import KeepRatioSchedule, freeze_layers, layerwise_parameter_groups
from .trainer import SegmentationTrainer, check_resume

__all__ = [
    "KeepRatioSchedule",
    "SegmentationLoss",
    "SegmentationTrainer",
    "check_resume",
    "class_weights",
    "count_labels",
    "freeze_layers",
    "layerwise_parameter_groups",
]
