"""Random views: picture and labels stay together, and everything follows from the generator."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ailurus_hf.data import SegmentationAugmentation
from tests.data.files import IGNORE, labelled_picture

PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def view(augmentation, image, labels, seed=0):
    return augmentation(image, labels, np.random.default_rng(seed), IGNORE)


@given(
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    scale=st.floats(0.1, 3),
    seed=st.integers(0, 1000),
)
def test_views_have_the_size_asked_for(crop, size, scale, seed):
    image, labels = Image.new("RGB", (size[1], size[0])), np.zeros(size, dtype=np.int64)
    found, found_labels = view(SegmentationAugmentation(crop, (scale, scale)), image, labels, seed)
    assert (found.height, found.width) == found_labels.shape == crop


def test_the_whole_picture_at_scale_1_is_itself():
    image, labels = labelled_picture(0)
    augmentation = SegmentationAugmentation((40, 56), (1, 1), 0.0, **PLAIN)
    found, found_labels = view(augmentation, image, labels)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    np.testing.assert_array_equal(found_labels, labels)


def test_a_crop_at_scale_1_is_a_window_of_the_picture():
    image, labels = labelled_picture(0)
    # Coordinates in place of labels tell where each pixel comes from.
    where = np.arange(labels.size).reshape(labels.shape)
    augmentation = SegmentationAugmentation((16, 24), (1, 1), 0.0, max_class_share=1, **PLAIN)
    corners = set()
    for seed in range(20):
        found, found_where = view(augmentation, image, where, seed)
        np.testing.assert_array_equal(
            np.asarray(found).reshape(-1, 3), np.asarray(image).reshape(-1, 3)[found_where.ravel()]
        )
        corners.add(int(found_where[0, 0]))
    assert len(corners) > 10


@pytest.mark.parametrize("scale", [0.5, 0.75, 2.0])
def test_picture_and_labels_are_scaled_alike(scale):
    """Blocks of one colour are blocks of one class: where no edge is near, the colour must tell the class."""
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(4, size=(4, 6)), np.ones((16, 16), dtype=np.int64))
    image = Image.fromarray((labels * 60).astype(np.uint8)).convert("RGB")
    augmentation = SegmentationAugmentation(
        (40, 70), (scale, scale), 0.5, max_class_share=1, fill=(255, 255, 255), **PLAIN
    )
    for seed in range(5):
        found, found_labels = view(augmentation, image, labels, seed)
        values = np.asarray(found)[..., 0].astype(int)
        inside = found_labels != IGNORE
        assert (values[~inside] == 255).all()
        near = np.abs(values[inside] - 60 * found_labels[inside]) <= 3
        assert near.mean() > 1 - 0.35 / scale  # bilinear edges
        assert inside.any()


def test_flips_mirror_picture_and_labels():
    image, labels = labelled_picture(1)
    augmentation = SegmentationAugmentation((40, 56), (1, 1), 1.0, **PLAIN)
    found, found_labels = view(augmentation, image, labels)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image)[:, ::-1])
    np.testing.assert_array_equal(found_labels, labels[:, ::-1])


def test_small_pictures_are_filled_and_ignored():
    image, _ = labelled_picture(0, 8, 8)
    augmentation = SegmentationAugmentation((20, 20), (1, 1), 0.0, fill=(1, 2, 3), **PLAIN)
    found, found_labels = view(augmentation, image, np.zeros((8, 8), dtype=np.int64))
    assert (found_labels[8:] == IGNORE).all()
    assert (found_labels[:, 8:] == IGNORE).all()
    assert (np.asarray(found)[8:] == [1, 2, 3]).all()


def test_crops_of_one_class_are_drawn_anew():
    labels = np.zeros((64, 64), dtype=np.int64)
    labels[:, 60:] = 1
    image = Image.new("RGB", (64, 64))

    def shares(limit):
        augmentation = SegmentationAugmentation((16, 16), (1, 1), 0.0, max_class_share=limit)
        return np.mean([view(augmentation, image, labels, seed)[1].max() for seed in range(100)])

    assert shares(0.95) > shares(1.0) + 0.2


def test_the_generator_decides_everything():
    image, labels = labelled_picture(2)
    augmentation = SegmentationAugmentation((32, 32))
    first, again, other = (view(augmentation, image, labels, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(np.asarray(first[0]), np.asarray(again[0]))
    np.testing.assert_array_equal(first[1], again[1])
    assert (np.asarray(first[0]) != np.asarray(other[0])).any()


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (
            {"brightness": 0.2},
            lambda before, after: len({*(after - before)[(after > 0) & (after < 255)].tolist()}) == 1,
        ),
        ({"contrast": 0.5}, lambda before, after: (np.sign(after - 128) * np.sign(before - 128) >= 0).all()),
        ({"saturation": 0.5}, lambda before, after: np.abs(after.mean() - before.mean()) < 10),
        ({"hue": 0.3}, lambda before, after: np.abs(after.max(-1) - before.max(-1)).max() <= 2),  # value stays
    ],
)
def test_each_colour_change_does_what_it_says(change, check):
    image, labels = labelled_picture(3)
    augmentation = SegmentationAugmentation((40, 56), (1, 1), 0.0, **{**PLAIN, **change})
    changed = 0
    for seed in range(12):
        found = np.asarray(view(augmentation, image, labels, seed)[0]).astype(int)
        before = np.asarray(image).astype(int)
        if (found != before).any():
            changed += 1
            assert check(before, found)
    assert 2 <= changed <= 10  # in half of the views


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": (0, 4)}, "crop_size must be at least 1 x 1"),
        ({"scale_range": (0.0, 1.0)}, "scale_range must be"),
        ({"scale_range": (2.0, 1.0)}, "scale_range must be"),
        ({"flip_probability": 1.5}, "flip_probability must be between 0 and 1, got 1.5"),
        ({"hue": -0.1}, "hue must be between 0 and 1"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentation(**{"crop_size": (4, 4), **settings})
