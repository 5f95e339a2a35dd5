"""Finding and reading picture files, with errors that name the file."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["IMAGE_SUFFIXES", "ImageFileError", "list_images", "opened", "read_image"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFileError(ValueError):
    """A file that cannot be used as a picture; the message names it and says why."""


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """Picture files among `paths`: files as they are, folders replaced by the pictures in them, sorted by name.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; expected a picture or a folder of pictures")
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB, turned upright by its EXIF orientation.

    Grey, palette and CMYK pictures are converted, transparency is dropped, and 16-bit greys are scaled to 8 bits.

    Raises:
        ImageFileError: the file is empty, damaged, no picture, animated, or has floating-point pixels.
        OSError: the file cannot be opened.
    """
    with opened(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageFileError(f"{path} is animated ({frames} frames); expected a single picture")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), path)


@contextmanager
def opened(path: str | Path, expected: str = "a picture") -> Iterator[Image.Image]:
    """A picture file, not decoded yet; what Pillow raises inside the block becomes an `ImageFileError`.

    Args:
        path: the file.
        expected: what an empty file is not.

    Raises:
        ImageFileError: the file is empty, damaged or no picture.
        OSError: the file cannot be opened.
    """
    # Opened here and not by Pillow: an OSError of `open` says that the file cannot be reached, one of Pillow that it is
    # damaged.
    with open(path, "rb") as file:
        if not file.read(1):
            raise ImageFileError(f"{path} is empty; expected {expected}")
        file.seek(0)
        try:
            with Image.open(file) as image:
                yield image
        except ImageFileError:
            raise
        except UnidentifiedImageError as error:
            raise ImageFileError(f"{path} is not a picture that Pillow can read") from error
        # Pillow's readers raise any of these, SyntaxError for broken PNG chunks.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ImageFileError(f"{path} is damaged or cut short ({error})") from error


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "F":
        raise ImageFileError(f"{path} has floating-point pixels; expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")
