"""What every metric is here, sums that grow picture by picture; and metrics of `evaluate` by name."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.extras import needs_extra
from .processes import gather

__all__ = ["Accumulator", "load_metric", "metric_names"]

METRICS = Path(__file__).parent / "metrics"


class Accumulator(ABC):
    """A metric that turns each picture into sums at once and keeps neither predictions nor references.

    `counts` is all that it remembers, one tensor, and it is additive: the counts of two halves of the pictures add up
    to those of all. That is what several processes, `evaluate` and `transformers.Trainer` build on.

    Subclasses set `counts` to zeros in the constructor: int64, or float64 for sums of errors.
    """

    counts: Tensor

    @abstractmethod
    def update(self, predictions: Tensor, references: Tensor, /) -> None:
        """Add one picture: two maps (height, width) on any device."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Scores by name of everything added so far; NaN where nothing was counted."""

    def by_class(self) -> dict[str, Tensor]:
        """Scores of every class by name, (num_labels,) float64; metrics without classes have none."""
        return {}

    def reset(self) -> None:
        """Start anew."""
        # Another tensor in place of zero_(): whoever took the counts keeps them.
        self.counts = torch.zeros_like(self.counts)

    def add_processes(self) -> None:
        """Make `counts` the sum over all processes that were launched together, in each of them.

        Integers are those of one process exactly; sums of errors, as `DepthErrors` keeps them, within rounding.
        """
        self.counts = torch.stack(gather([self.counts])).sum(0)


def metric_names() -> list[str]:
    """Names of the metrics that the package brings."""
    return sorted(folder.name for folder in METRICS.iterdir() if (folder / f"{folder.name}.py").is_file())


def load_metric(name: str, **settings: Any) -> Any:
    """Load a metric of this package with `evaluate.load`; needs no network.

    Args:
        name: "mean_iou", "boundary_f", "agreement" or "depth".
        settings: for the metric, such as `num_labels=150, ignore_index=255`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in metric_names():
        raise ValueError(f"name must be one of {', '.join(metric_names())}, got {name!r}")
    with needs_extra("eval", "metrics for `evaluate`"):
        import evaluate

    return evaluate.load(str(METRICS / name), **settings)
