"""Labelled pictures on disk, in the layouts of common data sets, and from Hugging Face `datasets`.

A source is a sequence of `LabelledImage`: `len(source)`, `source[index]`. Nothing is read before it is asked for.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..modeling.label_maps import class_names
from ..utils.extras import needs_extra
from ..utils.files import read_json_object
from .images import read_image
from .label_maps import check_label_files, label_array, pair_files, read_labels
from .labelled import LabelledImage, LabelRule

__all__ = ["CITYSCAPES_CLASSES", "HubSegmentation", "SegmentationFolder", "labelled_row", "open_layout"]

# Name, id in the *_labelIds.png files and colour of the 19 classes of evaluation, in the order of their train ids
# (Cordts et al., CVPR 2016, and the data set's own scripts).
CITYSCAPES_CLASSES: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)), ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)), ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)), ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)), ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
)  # fmt: skip
ADE20K_NUM_CLASSES = 150
logger = logging.getLogger(__name__)
LABEL_COLUMNS = ("annotation", "label", "labels", "mask", "semantic_segmentation", "segmentation_mask")


class SegmentationFolder(Sequence[LabelledImage]):
    """Pictures and label maps on disk.

    Args:
        pairs: (picture, label map) files.
        rule: how the numbers in the label files become classes.
        id2label: names of the classes, where the data set brings them.
        palette: colours of the classes, red, green, blue from 0 to 255.

    Raises:
        FileNotFoundError: there are no pairs.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        rule: LabelRule | None = None,
        id2label: Mapping[int, str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not pairs:
            raise FileNotFoundError("there are no pictures with labels to read")
        self.pairs = list(pairs)
        self.rule = rule or LabelRule()
        self.id2label = dict(id2label) if id2label else None
        self.palette = [list(colour) for colour in palette] if palette else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> LabelledImage:  # type: ignore[override]  # no slices
        """Read one sample.

        Raises:
            ImageFileError: the picture or the label map is damaged or no picture.
            ValueError: their sizes differ, or a label is outside the classes.
        """
        picture, label_file = self.pairs[index]
        image, labels = read_image(picture), read_labels(label_file)
        _check_sizes(image, labels, picture, label_file)
        return LabelledImage(image, self.rule(labels, str(label_file)), str(label_file))

    @classmethod
    def camvid(cls, root: str | Path, split: str = "train") -> "SegmentationFolder":
        """ROOT/SPLIT/images/NAME.jpg with ROOT/SPLIT/labels/NAME.png.

        ROOT/classes.json may hold `id2label`, `palette` and `ignore_index`; without it labels go unchecked and 255 is
        ignored.
        """
        folder = _existing(Path(root) / split)
        file = Path(root) / "classes.json"
        classes = read_json_object(file, "id2label") if file.is_file() else {}
        given = classes.get("id2label") or {}
        names = dict(enumerate(class_names(given, max(map(int, given)) + 1))) if given else None
        rule = LabelRule(len(names) if names else None, classes.get("ignore_index", 255))
        return cls(pair_files(folder / "images", folder / "labels"), rule, names, classes.get("palette"))

    @classmethod
    def ade20k(cls, root: str | Path, split: str = "training") -> "SegmentationFolder":
        """ADEChallengeData2016: ROOT/images/SPLIT/NAME.jpg with ROOT/annotations/SPLIT/NAME.png, 150 classes.

        Label 0, "other", is ignored; the other labels go down by 1. Names come from ROOT/objectInfo150.txt.
        """
        images, labels = Path(root) / "images" / split, Path(root) / "annotations" / split
        rule = LabelRule(ADE20K_NUM_CLASSES, reduce_labels=True)
        return cls(pair_files(_existing(images), _existing(labels)), rule, _ade20k_names(Path(root)))

    @classmethod
    def cityscapes(cls, root: str | Path, split: str = "train") -> "SegmentationFolder":
        """ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png with ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png.

        19 classes of evaluation; everything else is ignored. Files *_gtFine_labelTrainIds.png are used where there are
        no *_labelIds.png.
        """
        images, labels = (_existing(Path(root) / kind / split) for kind in ("leftImg8bit", "gtFine"))
        train_ids = not any(labels.glob("*/*_gtFine_labelIds.png"))
        suffix = "_gtFine_labelTrainIds.png" if train_ids else "_gtFine_labelIds.png"
        pairs = _city_pairs(images, labels, suffix)
        label_ids = None if train_ids else {number: train for train, (_, number, _) in enumerate(CITYSCAPES_CLASSES)}
        rule = LabelRule(len(CITYSCAPES_CLASSES), label_ids=label_ids)
        names = {index: name for index, (name, _, _) in enumerate(CITYSCAPES_CLASSES)}
        return cls(pairs, rule, names, [colour for _, _, colour in CITYSCAPES_CLASSES])


LAYOUTS = {
    "camvid": (SegmentationFolder.camvid, ("train", "val")),
    "ade20k": (SegmentationFolder.ade20k, ("training", "validation")),
    "cityscapes": (SegmentationFolder.cityscapes, ("train", "val")),
}


def open_layout(root: str | Path, layout: str = "camvid") -> tuple[SegmentationFolder, SegmentationFolder]:
    """Training and validation split of a data set on disk.

    Args:
        root: its folder.
        layout: "camvid" (any data set in split/images and split/labels), "ade20k" or "cityscapes".

    Raises:
        ValueError: the layout is unknown.
        FileNotFoundError: a folder or a label file is missing.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    read, (train, validation) = LAYOUTS[layout]
    return read(root, train), read(root, validation)


class HubSegmentation(Sequence[LabelledImage]):
    """Rows of a Hugging Face `datasets.Dataset` or `IterableDataset` with a picture and a label map.

    Args:
        dataset: one split. A stream can only be gone through, from its beginning each time: it has no length.
        rule: how its numbers become classes.
        image_column: column of the pictures.
        label_column: column of the label maps (pictures of class ids, or arrays); None looks for a usual name.

    Raises:
        ValueError: there is no such column, or the dataset is empty.
    """

    def __init__(
        self,
        dataset: Any,
        rule: LabelRule | None = None,
        image_column: str = "image",
        label_column: str | None = None,
    ) -> None:
        columns = getattr(dataset, "column_names", None)
        if columns is None or not hasattr(dataset, "__len__"):  # a stream
            first = next(iter(dataset), None)
            empty, columns = first is None, columns or list(first or ())
        else:
            empty = not len(dataset)
        if empty:
            raise ValueError("the dataset is empty")
        label_column = _label_column(columns, image_column, label_column)
        for column in (image_column, label_column):
            dataset = _undecoded(dataset, column)
        self.dataset, self.rule = dataset, rule or LabelRule()
        self.image_column, self.label_column = image_column, label_column

    def __len__(self) -> int:
        """Raises TypeError for a stream."""
        if not hasattr(self.dataset, "__len__"):
            raise TypeError("a stream has no length: go through it, or load the data set without streaming=True")
        return len(self.dataset)

    def __getitem__(self, index: int) -> LabelledImage:  # type: ignore[override]  # no slices
        """Decode one row; errors as in `SegmentationFolder`, and TypeError for a stream."""
        if not hasattr(self.dataset, "__len__"):
            raise TypeError(
                "a stream has no rows by number: go through it, or load the data set without streaming=True"
            )
        return self._read(index, self.dataset[int(index)])

    def __iter__(self) -> Iterator[LabelledImage]:
        """Decode row after row; after an error the iterator goes on with the next."""
        return map(self._read, itertools.count(), self.dataset)

    def _read(self, index: int, row: Mapping[str, Any]) -> LabelledImage:
        return labelled_row(row, f"row {index}", self.rule, self.image_column, self.label_column)


def labelled_row(
    row: Mapping[str, Any],
    name: str,
    rule: LabelRule,
    image_column: str = "image",
    label_column: str | None = None,
) -> LabelledImage:
    """Decode a row of a data set; the arguments are those of `HubSegmentation`, the errors of `SegmentationFolder`."""
    label_column = _label_column(list(row), image_column, label_column)
    image = read_image(_stored(row[image_column]), name)
    labels = _stored(row[label_column])
    labels = read_labels(labels, name) if isinstance(labels, bytes | Path) else label_array(labels, name)
    _check_sizes(image, labels, name, name)
    return LabelledImage(image, rule(labels, name), name)


def _label_column(columns: Sequence[str], image_column: str, label_column: str | None) -> str:
    """Name of the label maps' column, where none is given a usual one.

    Raises:
        ValueError: there is no such column, or none for the pictures.
    """
    if label_column is None:
        label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    for role, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            raise ValueError(f"{role} must be one of the dataset's columns {list(columns)}, got {column!r}")
    return str(label_column)


def _check_sizes(image: Image.Image, labels: np.ndarray, picture: str | Path, label_file: str | Path) -> None:
    orientation = image.info["orientation"]
    if labels.shape != (image.height, image.width):
        turned = f", turned upright by its EXIF orientation {orientation}: the labels must be, too" * (orientation != 1)
        raise ValueError(
            f"{label_file} is {labels.shape[1]} x {labels.shape[0]} pixels, but its picture {picture} is "
            f"{image.width} x {image.height}{turned}; they must have the same size"
        )
    # Up to 4 the sides stay what they are: labels of the picture before it was turned would pass unnoticed.
    if orientation in (2, 3, 4) or (orientation != 1 and image.height == image.width):
        _say_turned(str(picture), str(label_file), orientation)


@cache
def _say_turned(picture: str, label_file: str, orientation: int) -> None:
    logger.warning(
        "%s is turned upright by its EXIF orientation %s; its labels %s are taken to be upright, which their size does "
        "not tell",
        picture,
        orientation,
        label_file,
    )


def _undecoded(dataset: Any, column: str | None) -> Any:
    """The dataset with a column of pictures as their files' bytes, which Pillow has not scaled, clipped or turned yet.

    Columns that are no pictures, and rows that the user formats, stay as they are.
    """
    feature: Any = (getattr(dataset, "features", None) or {}).get(column)
    formatted = (getattr(dataset, "format", None) or {}).get("type") is not None
    if formatted or type(feature).__name__ != "Image" or not feature.decode or feature.mode is not None:
        return dataset
    return dataset.cast_column(column, type(feature)(decode=False))


def _stored(value: Any) -> Any:
    """A cell's file: its bytes or its path; what is no file as it is."""
    if not isinstance(value, dict) or "bytes" not in value:
        return value
    if value["bytes"] is not None:
        return value["bytes"]
    if os.path.lexists(value["path"]):
        return Path(value["path"])
    with needs_extra("train", "data sets of the Hub"):
        from datasets import Image as ImageFeature

    return ImageFeature().decode_example(value)  # in an archive, or on the Hub


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; check the data set's root, layout and split")
    return folder


def _ade20k_names(root: Path) -> dict[int, str] | None:
    """First synonym of every class from the table `Idx Ratio Train Val Name`, separated by tabs."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return None
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return {int(row[0]) - 1: row[-1].split(",")[0].strip() for row in rows}


def _city_pairs(images: Path, labels: Path, suffix: str) -> list[tuple[Path, Path]]:
    pictures = sorted(images.glob("*/*_leftImg8bit.png"))
    if not pictures:
        raise FileNotFoundError(f"{images} holds no CITY/*_leftImg8bit.png")
    pairs = [
        (picture, labels / picture.parent.name / picture.name.replace("_leftImg8bit.png", suffix))
        for picture in pictures
    ]
    check_label_files(pairs)
    return pairs
