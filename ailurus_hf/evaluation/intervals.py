"""How sure a difference between two budgets is, given the pictures at hand: a paired bootstrap over pictures."""

from typing import NamedTuple

import numpy as np

__all__ = ["PAIRED_RESAMPLES", "Interval", "bootstrap_weights", "mean_iou_of", "percentiles"]

PAIRED_RESAMPLES = 2000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def bootstrap_weights(num_pictures: int, resamples: int = PAIRED_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each picture is drawn in each resample, (resamples, num_pictures) int64: the same for all budgets, so
    that a difference between two is over the same pictures (Efron and Tibshirani 1993, section 13.3)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), size=resamples)


def mean_iou_of(counts: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes that occur, as `ConfusionMatrix` has it: (..., num_labels, num_labels) -> (...)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts.sum(-2) - hits
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=union > 0)
    occurring: np.ndarray = np.maximum((union > 0).sum(-1), 1)
    mean: np.ndarray = iou.sum(-1) / occurring
    return mean


def percentiles(values: np.ndarray) -> Interval:
    """The 2.5th and 97.5th percentile."""
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return Interval(low, high)
