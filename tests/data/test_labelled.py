"""Numbers in label files become classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ailurus_hf.data import LabelRule

MAP = np.array([[0, 1, 2], [3, 150, 255]])


def test_values_stay_as_they_are_by_default():
    np.testing.assert_array_equal(LabelRule(151)(MAP, "map"), MAP)
    assert LabelRule(151)(MAP.astype(np.uint8), "map").dtype == np.int64


def test_reduced_labels_lose_class_0():
    np.testing.assert_array_equal(LabelRule(150, reduce_labels=True)(MAP, "map"), [[255, 0, 1], [2, 149, 255]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (LabelRule(150, ignore_index=150, reduce_labels=True), [150, 0, 1, 2, 149, 150]),
        (LabelRule(150, ignore_index=-100, reduce_labels=True), [-100, 0, 1, 2, 149, -100]),
        (LabelRule(150, ignore_index=200, reduce_labels=True), [200, 0, 1, 2, 149, 200]),
        (LabelRule(300, ignore_index=1000, reduce_labels=True), [1000, 0, 1, 2, 149, 254]),
        (LabelRule(None, ignore_index=150, reduce_labels=True), [150, 0, 1, 2, 149, 150]),
        (LabelRule(151, ignore_index=-100), [0, 1, 2, 3, 150, -100]),
        (LabelRule(256, ignore_index=-100), [0, 1, 2, 3, 150, 255]),
    ],
)
def test_no_class_is_lost_and_nothing_else_counts(rule, expected):
    np.testing.assert_array_equal(rule(MAP, "map").ravel(), expected)


def test_what_the_files_ignore_is_not_reduced():
    np.testing.assert_array_equal(LabelRule(3, 200, reduce_labels=True)(np.array([[200, 3]]), "map"), [[200, 2]])
    np.testing.assert_array_equal(LabelRule(3, -100, reduce_labels=True)(np.array([[-100, 3]]), "map"), [[-100, 2]])
    with pytest.raises(ValueError, match="labels outside the classes: 253"):
        LabelRule(150, reduce_labels=True)(np.array([[254]]), "map")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.dictionaries(st.integers(0, 200), st.integers(0, 9)))
def test_mapped_labels_equal_a_loop(values, label_ids):
    mapped = LabelRule(10, ignore_index=77, label_ids=label_ids)(np.array([values]), "map")
    np.testing.assert_array_equal(mapped, [[label_ids.get(value, 77) for value in values]])


def test_labels_outside_the_classes_are_named_with_their_file():
    with pytest.raises(ValueError, match=r"street\.png has labels outside the classes: 3, 150; allowed are 0 to 2"):
        LabelRule(3)(MAP, "street.png")
    with pytest.raises(ValueError, match=r"-1; allowed"):
        LabelRule(3)(np.array([[0, -1]]), "street.png")


def test_contradictory_rules_are_refused():
    with pytest.raises(ValueError, match="both renumber"):
        LabelRule(3, reduce_labels=True, label_ids={0: 1})
    with pytest.raises(ValueError, match="ignore_index must not be one of the 3 classes, got 2"):
        LabelRule(3, ignore_index=2)
