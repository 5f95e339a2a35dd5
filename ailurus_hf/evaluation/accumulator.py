"""What every metric is here: sums that grow picture by picture."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..utils.extras import needs_extra

__all__ = ["Accumulator"]


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
        with needs_extra("eval", "metrics of several processes"):
            from accelerate.utils import gather_object

        self.counts = torch.stack(gather_object([self.counts])).sum(0)
