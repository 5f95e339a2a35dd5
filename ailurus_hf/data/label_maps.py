"""Finding and reading label maps: pictures whose pixel values are class ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .images import ImageFileError, list_images, opened

__all__ = ["check_label_files", "label_array", "pair_files", "read_labels"]

SHOWN = 3


def pair_files(images: str | Path, labels: str | Path) -> list[tuple[Path, Path]]:
    """Pictures in a folder with the label maps of the same name in another, `NAME.png`, sorted by name.

    Raises:
        FileNotFoundError: a folder is missing or holds no pictures, or pictures have no label map; the message names
            some of the missing files.
    """
    pairs = [(image, Path(labels) / f"{image.stem}.png") for image in list_images([images])]
    check_label_files(pairs)
    return pairs


def check_label_files(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Check that every picture has its label map.

    Raises:
        FileNotFoundError: some are missing; the message names a few.
    """
    missing = [str(label) for _, label in pairs if not label.is_file()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} label files are missing: {', '.join(missing[:SHOWN])}{more}"
        )


def read_labels(path: str | Path) -> np.ndarray:
    """Read a label map, (height, width) int64.

    Pixel values of grey pictures with 8 or 16 bits, and palette indices, are the class ids as they are.

    Raises:
        ImageFileError: the file is empty, damaged, no picture, or has colours in place of class ids.
        OSError: the file cannot be opened.
    """
    with opened(path, "a label map") as image:
        image.load()
        return label_array(image, str(path))


def label_array(labels: Any, name: str) -> np.ndarray:
    """Class ids of a picture or an array, (height, width) int64.

    Args:
        labels: picture of class ids, or an array of integers (height, width).
        name: what to call it in errors.

    Raises:
        ImageFileError: it has colours, or several channels, or fractions in place of class ids.
    """
    if isinstance(labels, Image.Image) and labels.mode == "1":
        labels = labels.convert("L")  # black and white: classes 0 and 255
    values = np.asarray(labels)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise ImageFileError(
            f"{name} is no label map: expected one integer per pixel, got shape {values.shape} of {values.dtype}; "
            "turn colours into class ids first"
        )
    return values.astype(np.int64)
