"""Label maps as pictures."""

from typing import Any

import numpy as np
from PIL import Image

__all__ = ["colour_labels", "indexed_image", "model_palette", "overlay"]

MAX_INDEXED_CLASSES = 256


def model_palette(config: Any) -> np.ndarray:
    """Colours of the classes, (num_labels, 3) uint8: `config.palette`, or else the colour map of the PASCAL VOC labels.

    Of a model with one channel, (2, 3): the background is black.
    """
    colours = _colours(config)
    return np.concatenate([np.zeros_like(colours), colours]) if config.num_labels == 1 else colours


def _colours(config: Any) -> np.ndarray:
    if (palette := getattr(config, "palette", None)) is not None:
        return np.asarray(palette, dtype=np.uint8)
    classes = np.arange(1, config.num_labels + 1)  # 0, black in that colour map, would be invisible in an overlay
    colours = np.zeros((config.num_labels, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((classes >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def colour_labels(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Label map (height, width) as an RGB picture."""
    return Image.fromarray(palette[labels])


def overlay(image: Image.Image, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """The picture with its classes' colours on it."""
    return Image.blend(image.convert("RGB"), colour_labels(labels, palette), opacity)


def indexed_image(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Label map as a picture whose pixel values are the class ids; in colour ("P") up to 256 classes, else 16-bit."""
    if len(palette) > MAX_INDEXED_CLASSES:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.frombytes("P", labels.shape[::-1], labels.astype(np.uint8).tobytes())
    picture.putpalette(palette.tobytes())
    return picture
