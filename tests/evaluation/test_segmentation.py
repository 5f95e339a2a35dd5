import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ailurus_hf.evaluation import ConfusionMatrix


def slow_iou(predictions, labels, num_labels, ignore_index):
    result = []
    for label in range(num_labels):
        both = either = 0
        for found, truth in zip(predictions.ravel(), labels.ravel(), strict=True):
            if truth == ignore_index:
                continue
            both += found == label == truth
            either += label in (found, truth)
        result.append(both / either if either else math.nan)
    return result


@given(num_labels=st.integers(1, 6), ignored=st.floats(0, 1), seed=st.integers(0, 1000))
def test_matches_loops_over_pixels(num_labels, ignored, seed):
    rng = np.random.default_rng(seed)
    predictions = rng.integers(0, num_labels, (3, 7, 5))
    labels = np.where(rng.random((3, 7, 5)) < ignored, 255, rng.integers(0, num_labels, (3, 7, 5)))
    matrix = ConfusionMatrix(num_labels)
    for found, truth in zip(predictions, labels, strict=True):
        matrix.update(torch.tensor(found), torch.tensor(truth))
    expected = slow_iou(predictions, labels, num_labels, 255)
    np.testing.assert_allclose(matrix.iou().numpy(), expected)
    np.testing.assert_allclose(matrix.mean_iou(), np.nanmean(expected) if not np.isnan(expected).all() else np.nan)
    counted = labels != 255
    accuracy = (predictions == labels)[counted].mean() if counted.any() else np.nan
    np.testing.assert_allclose(matrix.pixel_accuracy(), accuracy)


def test_classes_that_never_occur_do_not_count():
    matrix = ConfusionMatrix(3, ignore_index=9)
    matrix.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 9]))
    assert matrix.iou().tolist()[:2] == [0.5, 0.5]
    assert math.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == 0.5
    assert matrix.pixel_accuracy() == pytest.approx(2 / 3)


def test_all_pixels_ignored():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(4, dtype=torch.uint8), torch.full((4,), 255, dtype=torch.uint8))
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())


def test_refuses_what_is_no_class():
    with pytest.raises(ValueError, match=r"labels must be classes from 0 to 2 or ignore_index=255, got .* 0 to 3"):
        ConfusionMatrix(3).update(torch.tensor([0, 0]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"predictions must be classes from 0 to 2, got values from -1 to 0"):
        ConfusionMatrix(3).update(torch.tensor([-1, 0]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        ConfusionMatrix(3).update(torch.zeros(2), torch.zeros(3))
