"""Finding and reading label maps: pictures whose pixel values are class ids."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .images import ImageFileError, is_file_managers, list_images, opened

__all__ = ["check_equal_names", "check_label_files", "label_array", "pair_files", "read_labels"]

SHOWN = 3
LABEL_SUFFIXES = (".png", ".tif", ".tiff")


def pair_files(images: str | Path, labels: str | Path) -> list[tuple[Path, Path]]:
    """Pictures in a folder with the label maps of the same name in another, sorted by name.

    Label maps are `NAME.png`, or else `NAME.tif` or `NAME.tiff`; upper case will do for what follows the dot.

    Raises:
        FileNotFoundError: a folder is missing or holds no pictures, or pictures have no label map; the message names
            some of the missing files.
        ValueError: two pictures have the same name, up to what follows the dot.
    """
    pictures = list_images([images])
    check_equal_names(pictures, [file.stem for file in pictures], "have the label map {}.png")
    found = _label_files(Path(labels))
    pairs = [(picture, found.get(picture.stem, Path(labels) / f"{picture.stem}.png")) for picture in pictures]
    # What is no file has no label map either; that it cannot be read is said when it is its turn.
    check_label_files([pair for pair in pairs if pair[0].is_file()])
    return pairs


def _label_files(folder: Path) -> dict[str, Path]:
    """Label map of every name in a folder; where there are several, by the order of `LABEL_SUFFIXES`."""
    if not folder.is_dir():
        return {}
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in LABEL_SUFFIXES and not is_file_managers(file)
    ]
    files.sort(key=lambda file: (LABEL_SUFFIXES.index(file.suffix.lower()), file.suffix != ".png"))
    return {file.stem: file for file in reversed(files)}


def check_equal_names(pictures: Sequence[Path], names: Sequence[Any], consequence: str) -> None:
    """Check that no two pictures get the same name.

    Raises:
        ValueError: two do; the message names them, and the consequence.
    """
    common, count = Counter(names).most_common(1)[0]
    if count > 1:
        same = ", ".join(str(file) for file, name in zip(pictures, names, strict=True) if name == common)
        raise ValueError(f"{count} pictures would all {consequence.format(common)}: {same}")


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


def read_labels(source: str | Path | bytes, name: str | None = None) -> np.ndarray:
    """Read a label map, (height, width) int64.

    The numbers that are stored, whatever their bits, are the class ids: grey values of 1 to 32 bits or palette indices.
    A label map with an EXIF orientation is turned by it, as pictures are.

    Args:
        source: the file, or what it holds.
        name: what to call it in errors; None for its path.

    Raises:
        ImageFileError: the file is empty, damaged, no picture, or has colours in place of class ids.
        OSError: the file cannot be opened.
    """
    name = str(source) if name is None else name
    with opened(source, name, "a label map") as image:
        return label_array(image, name)


def label_array(labels: Any, name: str) -> np.ndarray:
    """Class ids of a picture or an array, (height, width) int64.

    Args:
        labels: picture of class ids, or an array of integers or booleans (height, width).
        name: what to call it in errors.

    Raises:
        ImageFileError: it has colours, or several channels, or fractions in place of class ids.
    """
    scale = 1.0
    if isinstance(labels, Image.Image):
        scale = _scale(labels)  # known until the picture is decoded
        labels.load()
        labels = ImageOps.exif_transpose(labels)
    values = np.asarray(labels)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ImageFileError(
            f"{name} is no label map: expected one integer per pixel, got shape {values.shape} of {values.dtype}; "
            "turn colours into class ids first"
        )
    return values.astype(np.int64) if scale == 1 else np.rint(values / scale).astype(np.int64)


def _scale(image: Image.Image) -> float:
    """What Pillow multiplies the numbers of a file by to spread them over its 8 or 16 bits; 1 once it is decoded."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return 1.0
    codec, _, _, arguments = tiles[0]
    raw_mode = arguments[0] if isinstance(arguments, tuple) else arguments
    if codec in ("ppm", "ppm_plain"):
        return (255 if image.mode == "L" else 65535) / arguments[1]
    for bits in (2, 4):
        if str(raw_mode).startswith(f"L;{bits}"):
            return 255 / (2**bits - 1)
    return 1.0
