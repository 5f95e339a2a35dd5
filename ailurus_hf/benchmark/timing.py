"""Timing several variants in turn, so that whatever else the machine does hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

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
            elapsed = _time(run)
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def speed_up(baseline: list[float], variant: list[float]) -> SpeedUp:
    """Ratio of the times of the same round, baseline over variant: median and quartiles."""
    ratios = [slow / fast for slow, fast in zip(baseline, variant, strict=True)]
    if len(ratios) < 2:
        return SpeedUp(ratios[0], ratios[0], ratios[0])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return SpeedUp(statistics.median(ratios), low, high)


def _time(run: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    run()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
