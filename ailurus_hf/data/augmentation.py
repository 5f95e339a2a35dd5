"""Random views of a labelled picture, with Pillow and numpy alone."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["SegmentationAugmentation"]

CROP_TRIALS = 10


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random scale, crop, flip and colours: the recipe of Segmenter (arXiv 2105.05633, section 4.2) and mmsegmentation.

    Args:
        crop_size: (height, width) of every view in pixels; views that reach beyond the picture are filled.
        scale_range: smallest and largest factor by which the picture is scaled, drawn uniformly.
        flip_probability: how often the view is mirrored left to right.
        brightness: largest change of all values, as a share of the full range.
        contrast: largest relative change of the distance to mid-grey.
        saturation: largest relative change of the distance to grey.
        hue: largest rotation of the hue, in turns.
        max_class_share: a crop in which one class has more than this share of the counted pixels is drawn anew, up to
            ten times; 1 takes the first.
        fill: colour beyond the picture; the default becomes 0 where the image processor's mean and deviation are 0.5.

    Raises:
        ValueError: a size or range that makes no sense.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_probability: float = 0.5
    brightness: float = 0.125
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.05
    max_class_share: float = 0.75
    fill: tuple[int, int, int] = (128, 128, 128)

    def __post_init__(self) -> None:
        if min(self.crop_size) < 1:
            raise ValueError(f"crop_size must be at least 1 x 1 pixels, got {self.crop_size}")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be (smallest, largest), both above 0, got {self.scale_range}")
        for name in ("flip_probability", "brightness", "contrast", "saturation", "hue", "max_class_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def __call__(
        self, image: Image.Image, labels: np.ndarray, rng: np.random.Generator, ignore_index: int = 255
    ) -> tuple[Image.Image, np.ndarray]:
        """One random view.

        Args:
            image: RGB picture.
            labels: (height, width) integers, of the picture's size.
            rng: where all randomness comes from.
            ignore_index: label of the filled pixels.

        Returns:
            The view and its labels, both `crop_size`.
        """
        scale = rng.uniform(*self.scale_range)
        # The labels decide which crop is taken, and cost less than the pixels: those are cut once, at the end.
        for _ in range(CROP_TRIALS):
            top, left = self._corner(labels.shape, scale, rng)
            view_labels = self._crop_labels(labels, scale, top, left, ignore_index)
            if self._balanced(view_labels, ignore_index):
                break
        view = self._crop_image(image, scale, top, left)
        if rng.random() < self.flip_probability:
            view, view_labels = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT), view_labels[:, ::-1]
        return self._recolour(view, rng), np.ascontiguousarray(view_labels)

    def _corner(self, shape: tuple[int, ...], scale: float, rng: np.random.Generator) -> tuple[int, int]:
        """Top left corner of the crop in the scaled picture; pictures smaller than the crop start at 0."""
        free = [max(_scaled(side, scale) - crop, 0) for side, crop in zip(shape, self.crop_size, strict=True)]
        return int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))

    def _crop_labels(self, labels: np.ndarray, scale: float, top: int, left: int, ignore_index: int) -> np.ndarray:
        """The crop of the scaled label map, by nearest neighbours, without scaling what lies outside it."""
        view = np.full(self.crop_size, ignore_index, dtype=labels.dtype)
        rows = _nearest(top, self.crop_size[0], labels.shape[0], scale)
        columns = _nearest(left, self.crop_size[1], labels.shape[1], scale)
        view[: rows.size, : columns.size] = labels[np.ix_(rows, columns)]
        return view

    def _crop_image(self, image: Image.Image, scale: float, top: int, left: int) -> Image.Image:
        """The crop of the scaled picture, bilinear."""
        height = min(self.crop_size[0], _scaled(image.height, scale) - top)
        width = min(self.crop_size[1], _scaled(image.width, scale) - left)
        (x0, x1), (y0, y1) = _box(image.width, scale, left, width), _box(image.height, scale, top, height)
        # Scaling with a box reads the region alone, edges in fractions of a pixel included.
        crop = image.resize((width, height), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
        return ImageOps.expand(crop, (0, 0, self.crop_size[1] - width, self.crop_size[0] - height), self.fill)

    def _balanced(self, labels: np.ndarray, ignore_index: int) -> bool:
        if self.max_class_share >= 1:
            return True
        counts = np.bincount(labels[labels != ignore_index])
        return bool(counts.size) and counts.max() <= self.max_class_share * counts.sum()

    def _recolour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Each change in half of the views; contrast before or after the colours, as in mmsegmentation."""

        # All draws first, each of them always: one change set to 0 leaves the other ones as they were.
        def chosen(amount: float) -> float:
            use, value = rng.random() < 0.5, rng.uniform(-amount, amount)
            return float(value) if use else 0.0

        brightness, contrast = chosen(self.brightness), chosen(self.contrast)
        saturation, hue, contrast_first = chosen(self.saturation), chosen(self.hue), rng.random() < 0.5
        image = _shift(image, brightness)
        if contrast_first:
            image = _contrast(image, contrast)
        if saturation:
            image = ImageEnhance.Color(image).enhance(1 + saturation)
        image = _rotate_hue(image, hue)
        return image if contrast_first else _contrast(image, contrast)


def _scaled(length: int, scale: float) -> int:
    return max(round(length * scale), 1)


def _nearest(first: int, count: int, length: int, scale: float) -> np.ndarray:
    """Source pixels of `count` scaled pixels from `first` on, as many as the picture has."""
    scaled = _scaled(length, scale)
    centres = np.arange(first, min(first + count, scaled)) + 0.5
    return np.minimum((centres * length / scaled).astype(np.int64), length - 1)


def _box(length: int, scale: float, first: int, count: int) -> tuple[float, float]:
    """Where `count` scaled pixels from `first` on lie in the source, in source pixels."""
    factor = length / _scaled(length, scale)
    return first * factor, min((first + count) * factor, length)


def _shift(image: Image.Image, amount: float) -> Image.Image:
    return image.point(lambda value: value + round(255 * amount)) if amount else image


def _contrast(image: Image.Image, amount: float) -> Image.Image:
    return image.point(lambda value: round(128 + (1 + amount) * (value - 128))) if amount else image


def _rotate_hue(image: Image.Image, turns: float) -> Image.Image:
    if not turns:
        return image
    hue, saturation, value = image.convert("HSV").split()
    # Pillow's hue is a byte, 256 of them a turn.
    rotated = hue.point(lambda h: (h + round(256 * turns)) % 256)
    return Image.merge("HSV", (rotated, saturation, value)).convert("RGB")
