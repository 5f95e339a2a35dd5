"""Labelled pictures: reading files and data sets' layouts, the data set and collator, random views."""

from .augmentation import SegmentationAugmentation
from .dataset import SegmentationCollator, SegmentationDataset
from .images import ImageFileError, list_images, read_image
from .label_maps import pair_files, read_labels
from .labelled import LabelledImage, LabelRule
from .layouts import HubSegmentation, SegmentationFolder, open_layout

__all__ = [
    "HubSegmentation",
    "ImageFileError",
    "LabelRule",
    "LabelledImage",
    "SegmentationAugmentation",
    "SegmentationCollator",
    "SegmentationDataset",
    "SegmentationFolder",
    "list_images",
    "open_layout",
    "pair_files",
    "read_image",
    "read_labels",
]
