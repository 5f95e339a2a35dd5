"""Finding and reading picture files, with errors that name the file."""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..modeling.image_processing_ailurus import eight_bits
from ..utils.files import is_marked

__all__ = ["IMAGE_SUFFIXES", "ImageFileError", "is_file_managers", "is_litter", "list_images", "opened", "read_image"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What file managers leave in folders of pictures; macOS also writes a file ._NAME for each NAME on foreign disks.
LITTER = (".ds_store", "desktop.ini", "thumbs.db")


class ImageFileError(ValueError):
    """A file that cannot be used as a picture; the message names it and says why."""


def list_images(paths: Iterable[str | Path], recursive: bool = False) -> list[Path]:
    """Picture files among `paths`: files as they are, folders replaced by the pictures in them, sorted by name.

    What file managers leave beside pictures (`._NAME`, `Thumbs.db`) and the pictures that `ailurus-hf predict` and
    `visualize` write are passed over.

    Args:
        paths: files and folders.
        recursive: the pictures in folders below the folders too.

    Raises:
        FileNotFoundError: a path does not exist, a folder holds no picture, or there is nothing but litter.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = path.rglob("*") if recursive else path.iterdir()
            pictures = sorted(file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and not is_litter(file))
            if not pictures:
                raise FileNotFoundError(f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
            found += pictures
        elif not os.path.lexists(path):
            raise FileNotFoundError(f"{path} does not exist; expected a picture or a folder of pictures")
        elif not is_litter(path):
            found.append(path)
    if not found:
        raise FileNotFoundError("there are no pictures among the files")
    return found


def is_litter(path: Path) -> bool:
    """Whether a file is one that file managers leave in folders of pictures, or a picture of this program's results."""
    try:
        return is_file_managers(path) or (path.suffix == ".png" and is_marked(path))
    except OSError:  # what cannot be read is said when it is its turn
        return False


def read_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Read a picture as 8-bit RGB, turned upright by its EXIF orientation.

    Grey, palette and CMYK pictures are converted, transparency is dropped, and 16-bit greys are scaled to 8 bits. Of
    files with previews, such as a phone's MPO or a TIFF with overviews, it is the picture itself.

    Args:
        source: the file, what it holds, or a picture of Pillow's.
        name: what to call it in errors; None for its path.

    Returns:
        The picture; its `info["orientation"]` is the EXIF orientation that it was turned by, 1 if it was not.

    Raises:
        ImageFileError: the file is empty, damaged, no picture, no regular file, animated, has floating-point pixels, or
            has more pixels than Pillow's limit.
        OSError: the file cannot be opened.
    """
    name = str(source) if name is None else name
    with opened(source, name) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and not _has_previews_only(image):
            raise ImageFileError(f"{name} is animated ({frames} frames); expected a single picture")
        if image.mode == "F":
            raise ImageFileError(f"{name} has floating-point pixels; expected 8 or 16 bits per channel")
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            upright = Image.fromarray(eight_bits(np.asarray(upright)))
        upright = upright.convert("RGB")
        upright.info["orientation"] = orientation if orientation in range(1, 9) else 1
        return upright


def is_file_managers(path: Path) -> bool:
    """Whether a file is one that file managers leave beside others."""
    return path.name.startswith("._") or path.name.lower() in LITTER


@contextmanager
def opened(source: str | Path | bytes | Image.Image, name: str, expected: str = "a picture") -> Iterator[Image.Image]:
    """A picture file, not decoded yet; what Pillow raises inside the block becomes an `ImageFileError`.

    Args:
        source: the file, what it holds, or the picture itself.
        name: what to call it in errors.
        expected: what an empty file is not.

    Raises:
        ImageFileError: the file is empty, damaged, no picture, no regular file, or beyond Pillow's limit.
        OSError: the file cannot be opened.
    """
    if isinstance(source, Image.Image):
        yield source
        return
    # Opened here and not by Pillow: an OSError of `open` says that the file cannot be reached, one of Pillow that it is
    # damaged.
    with io.BytesIO(source) if isinstance(source, bytes) else _file(Path(source)) as file:
        if not file.read(1):
            raise ImageFileError(f"{name} is empty; expected {expected}")
        file.seek(0)
        try:
            with Image.open(file) as image:
                yield image
        except ImageFileError:
            raise
        except UnidentifiedImageError as error:
            raise ImageFileError(f"{name} is not a picture that Pillow can read") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageFileError(
                f"{name} has more pixels than Pillow's limit ({error}); cut it into parts, or raise "
                "PIL.Image.MAX_IMAGE_PIXELS where you know the file"
            ) from error
        # Pillow's readers raise any of these, SyntaxError for broken PNG chunks.
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageFileError(f"{name} is damaged or cut short ({error})") from error


def _file(path: Path) -> BinaryIO:
    """Open a regular file; reading anything else could wait for ever."""
    if path.is_symlink() and not path.exists():
        raise ImageFileError(f"{path} is a link to {path.readlink()}, which does not exist")
    if path.is_dir():
        raise ImageFileError(f"{path} is a folder, not a picture")
    if path.exists() and not path.is_file():
        raise ImageFileError(f"{path} is no regular file; expected a picture")
    return path.open("rb")


def _has_previews_only(image: Image.Image) -> bool:
    """Whether a file's other pictures belong to one of them, to which it is then set."""
    if image.format == "MPO":  # a phone's or drone's JPEG with previews, depth or the other eye's view behind it
        return True
    if image.format != "TIFF":
        return False
    pages = []
    for number in range(image.n_frames):  # type: ignore[attr-defined]
        image.seek(number)
        # TIFF 6.0, NewSubfileType: bit 0 is a page of reduced resolution, bit 2 a mask.
        pages.append((image.tag_v2.get(254, 0) & 5, image.width * image.height))  # type: ignore[attr-defined]
    largest = max(pixels for _, pixels in pages)
    whole = [number for number, (kind, pixels) in enumerate(pages) if not kind and pixels == largest]
    if len(whole) != 1:
        return False
    image.seek(whole[0])
    return True
