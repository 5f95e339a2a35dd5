"""Training: the loss, learning rates and budgets, a Trainer for segmentation."""

from ..utils.extras import needs_extra
from .loss import SegmentationLoss, class_weights, count_labels

with needs_extra("train", "Trainer and its callbacks"):
    import accelerate  # noqa: F401  without it transformers fails at both lines below, and names no extra

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
