"""The loss against plain cross entropy, and what is added up over micro-batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ailurus_hf.data import LabelledImage
from ailurus_hf.training import SegmentationLoss, class_weights, count_labels
from tests.data.files import IGNORE, NUM_LABELS, labelled_picture

WEIGHT = torch.tensor([1.0, 0.5, 2.0, 3.0])


def batch(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_LABELS, (count, 6, 7), generator=generator)
    labels[:, : seed % 5] = IGNORE
    return SimpleNamespace(logits=torch.randn(count, NUM_LABELS, 6, 7, generator=generator)), labels


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_mean_over_the_pixels_that_count(weight):
    outputs, labels = batch(3)
    expected = F.cross_entropy(outputs.logits, labels, weight, ignore_index=IGNORE)
    torch.testing.assert_close(SegmentationLoss(IGNORE, weight)(outputs, labels), expected)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_micro_batches_add_up_to_the_whole_batch(weight):
    """Though they have different numbers of ignored pixels."""
    parts = [batch(seed) for seed in range(4)]
    loss = SegmentationLoss(IGNORE, weight)
    total = sum(loss.total_weight(labels) for _, labels in parts)
    whole = SimpleNamespace(logits=torch.cat([outputs.logits for outputs, _ in parts]))
    expected = loss(whole, torch.cat([labels for _, labels in parts]))
    torch.testing.assert_close(sum(loss(*part, num_items_in_batch=total) for part in parts), expected)
    mean_of_means = sum(loss(*part) for part in parts) / 4
    assert not torch.isclose(mean_of_means, expected, rtol=1e-4)


def test_nothing_to_count_is_no_loss_and_no_gradient():
    outputs, labels = batch(0)
    outputs.logits.requires_grad_()
    for arguments in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss = SegmentationLoss(IGNORE, WEIGHT)(outputs, torch.full_like(labels, IGNORE), **arguments)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, outputs.logits)[0].abs().max() == 0


def test_half_precision_logits_are_compared_in_single():
    outputs, labels = batch(1)
    half = SimpleNamespace(logits=outputs.logits.bfloat16())
    loss = SegmentationLoss(IGNORE)(half, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(half.logits.float(), labels, ignore_index=IGNORE))


def test_counts_equal_a_loop():
    samples = [LabelledImage(*labelled_picture(seed), name=str(seed)) for seed in range(3)]
    expected = [sum(int((sample.labels == label).sum()) for sample in samples) for label in range(NUM_LABELS)]
    np.testing.assert_array_equal(count_labels(samples, NUM_LABELS, IGNORE), expected)


def test_rare_classes_weigh_more():
    counts = np.array([100, 400, 0, 25])
    torch.testing.assert_close(class_weights(counts, 1.0), torch.tensor([1.0, 0.25, 1.0, 4.0]))
    torch.testing.assert_close(class_weights(counts, 0.5), torch.tensor([1.0, 0.5, 1.0, 2.0]))
    torch.testing.assert_close(class_weights(counts, 0.0), torch.ones(4))
    with pytest.raises(ValueError, match="power must be between 0 and 1, got 2"):
        class_weights(counts, 2)
    with pytest.raises(ValueError, match="at least one pixel"):
        class_weights(np.zeros(4))
