"""Drawn street scenes: sizes, labels, determinism, errors."""

import re
from itertools import pairwise

import numpy as np
import pytest

from ailurus_hf.demo.scenes import CLASS_NAMES, PALETTE, Scene, draw_scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, height=96, width=192) for seed in range(20)]


def test_same_seed_same_pixels(scenes: list[Scene]) -> None:
    for seed in (0, 7):
        again = draw_scene(seed, height=96, width=192)
        np.testing.assert_array_equal(again.image, scenes[seed].image)
        np.testing.assert_array_equal(again.labels, scenes[seed].labels)


def test_other_seed_other_scene(scenes: list[Scene]) -> None:
    for first, second in pairwise(scenes):
        assert (first.labels != second.labels).mean() > 0.05
        assert (first.image != second.image).mean() > 0.5


@pytest.mark.parametrize(("height", "width"), [(16, 16), (97, 203), (480, 270), (16, 300), (300, 16)])
def test_any_size(height: int, width: int) -> None:
    for seed in range(2):
        scene = draw_scene(seed, height=height, width=width)
        assert scene.image.shape == (height, width, 3)
        assert scene.labels.shape == (height, width)
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert scene.labels.max() < len(CLASS_NAMES)


def test_default_size() -> None:
    assert draw_scene(0).labels.shape == (256, 512)


def test_size_changes_resolution_not_scene() -> None:
    """The geometry scales with the size: at half the resolution nearly every label stays."""
    for seed in range(2):
        large, small = draw_scene(seed, 256, 512), draw_scene(seed, 128, 256)
        assert (large.labels[::2, ::2] == small.labels).mean() > 0.93


def test_every_class_is_common(scenes: list[Scene]) -> None:
    seen = [sum((scene.labels == index).any() for scene in scenes) for index in range(len(CLASS_NAMES))]
    assert min(seen) >= 15, dict(zip(CLASS_NAMES, seen, strict=True))


def test_no_class_dominates(scenes: list[Scene]) -> None:
    pixels = np.bincount(np.concatenate([scene.labels.ravel() for scene in scenes]), minlength=len(CLASS_NAMES))
    shares = pixels / pixels.sum()
    assert shares.max() < 0.5
    assert shares.min() > 0.002


def test_labels_follow_the_picture(scenes: list[Scene]) -> None:
    """Sky is above the road, and the picture has edges where the labels have borders."""
    for scene in scenes:
        rows = np.arange(96)[:, None] + np.zeros(192)
        assert (
            rows[scene.labels == CLASS_NAMES.index("sky")].mean()
            < rows[scene.labels == CLASS_NAMES.index("road")].min()
        )
        step = np.abs(np.diff(scene.image.astype(float).mean(-1), axis=1))
        border = np.diff(scene.labels.astype(int), axis=1) != 0
        assert step[border].mean() > 2 * step[~border].mean()


def test_colour_does_not_tell_the_class(scenes: list[Scene]) -> None:
    """Looking up a pixel's class by its colour alone must fail on many pixels, or the labels would be too easy."""
    images = np.concatenate([scene.image.reshape(-1, 3) for scene in scenes]) // 32
    labels = np.concatenate([scene.labels.ravel() for scene in scenes])
    table = np.zeros((512, len(CLASS_NAMES)))
    np.add.at(table, (images @ np.array([64, 8, 1]), labels), 1)
    assert table.max(1).sum() / table.sum() < 0.75


def test_palette() -> None:
    assert len(PALETTE) == len(set(PALETTE)) == len(CLASS_NAMES)
    colours = np.array(PALETTE, float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + 999 * np.eye(len(colours))
    assert distances.min() > 40
    assert all(0 <= channel <= 255 for colour in PALETTE for channel in colour)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0, "height": 15}, "height must be at least 16 pixels, got 15"),
        ({"seed": 0, "width": 0}, "width must be at least 16 pixels, got 0"),
        ({"seed": 0, "width": -64}, "width must be at least 16 pixels, got -64"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_scene(**arguments)
