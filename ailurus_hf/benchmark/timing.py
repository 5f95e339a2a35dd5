"""Timing several variants in turn, so that whatever else the machine does hits all of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from torch.utils.benchmark import timer  # waits for the device

__all__ = ["SpeedUp", "speed_up", "time_side_by_side"]


class SpeedUp(NamedTuple):
    """How many times faster, with the quartiles of the rounds."""

    median: float
    low: float
    high: float


def time_side_by_side(
    variants: Mapping[str, Callable[[], object]], rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Run every variant once per round and return its seconds, round by round.

    Args:
        variants: name -> function to time; device work is waited for.
        rounds: how many times each is timed.
        warmup: rounds before that, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warmup, rounds):
        for name, run in variants.items():
            start = timer()
            run()
            elapsed = timer() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def speed_up(baseline: list[float], variant: list[float]) -> SpeedUp:
    """Ratio of the times of the same round, baseline over variant: median and quartiles."""
    ratios = [slow / fast for slow, fast in zip(baseline, variant, strict=True)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return SpeedUp(median, low, high)
