"""Training: labelled pictures, random views, the loss, learning rates and budgets, a Trainer for segmentation."""

from ..labelled import LabelledImage, LabelRule
from .augmentation import SegmentationAugmentation
from .dataset import SegmentationCollator, SegmentationDataset
from .loss import SegmentationLoss, class_weights, count_labels
from .optimization import KeepRatioSchedule, freeze_layers, layerwise_parameter_groups
from .sources import HubSegmentation, SegmentationFolder, open_layout
from .trainer import SegmentationTrainer, check_resume

__all__ = [
    "HubSegmentation",
    "KeepRatioSchedule",
    "LabelRule",
    "LabelledImage",
    "SegmentationAugmentation",
    "SegmentationCollator",
    "SegmentationDataset",
    "SegmentationFolder",
    "SegmentationLoss",
    "SegmentationTrainer",
    "check_resume",
    "class_weights",
    "count_labels",
    "freeze_layers",
    "layerwise_parameter_groups",
    "open_layout",
]
