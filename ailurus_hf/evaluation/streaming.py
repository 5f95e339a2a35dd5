"""Metrics for the `evaluate` library that keep counts, never predictions."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from ..modeling.label_maps import class_names
from ..utils.extras import needs_extra
from .accumulator import Accumulator

with needs_extra("eval", "metrics for `evaluate`"):
    import datasets
    import evaluate

__all__ = ["StreamingMetric"]


class StreamingMetric(evaluate.Metric, ABC):
    """An `Accumulator` as a metric of `evaluate`.

    `evaluate` would write what is added to a file and read it all back in `compute`, which for label maps and depth
    maps is slow and large. `add`, `add_batch`, `compute` and `evaluate.combine` work as with any metric. After
    `compute` the counts start anew. The scores are the accumulator's, and those of each class as `SCORE/CLASS`, the
    form that loggers take.

    Subclasses set `accumulator`, and `value_type` where the maps hold no integers.

    Args:
        config_name: as in `evaluate.Metric`.
        num_process: only 1, since every process adds up its own counts: see `evaluate_segmentation` for several.
        id2label: names of the classes in the scores; None for their numbers.
        settings: other arguments of `evaluate.Metric`, and those of the accumulator.

    Raises:
        ValueError: `num_process` above 1, or as in the accumulator.
        TypeError: a setting that neither of them has.
    """

    value_type: ClassVar[str] = "int64"

    # Abstract, so that `evaluate.load`, which takes the first class of a file that can be made, passes over this one.
    @property
    @abstractmethod
    def accumulator(self) -> type[Accumulator]:
        """The class that counts."""

    def __init__(
        self,
        config_name: str | None = None,
        num_process: int = 1,
        id2label: Mapping[int, str] | None = None,
        **settings: Any,
    ) -> None:
        if num_process != 1:
            raise ValueError(
                f"num_process must be 1, got {num_process}: every process would compute its own share's result; "
                "use ailurus_hf.evaluation.evaluate_segmentation, which adds up the counts of all processes"
            )
        own = {name: settings.pop(name) for name in inspect.signature(evaluate.Metric).parameters if name in settings}
        super().__init__(config_name=config_name, num_process=1, **own)
        self.counter, self.id2label = self.accumulator(**settings), id2label

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one picture: two maps (height, width), arrays, tensors or nested lists."""
        _refuse(kwargs)
        self.counter.update(_tensor("prediction", prediction), _tensor("reference", reference))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add several pictures, of the same size or not.

        Raises:
            ValueError: there are not as many predictions as references.
        """
        _refuse(kwargs)
        if len(predictions) != len(references):
            raise ValueError(
                f"there must be a reference for each of the {len(predictions)} predictions, got {len(references)}"
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Scores of everything added so far, and of these pictures."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        _refuse(kwargs)
        scores: dict[str, Any] = self.counter.compute()
        for score, values in self.counter.by_class().items():
            names = class_names(self.id2label, len(values))
            scores |= {f"{score}/{name}": value for name, value in zip(names, values.tolist(), strict=True)}
        self.counter.reset()
        return scores

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value(self.value_type)))
        return evaluate.MetricInfo(
            description=inspect.getdoc(self.accumulator),
            citation="",
            inputs_description="predictions and references: lists of maps (height, width)",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )


def _tensor(name: str, value: Any) -> torch.Tensor:
    if value is None:
        raise ValueError(f"{name} is missing")
    # By way of numpy: torch is slow on nested lists of arrays.
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(
            f"unknown argument {', '.join(kwargs)}; settings such as num_labels are given when the metric is loaded"
        )
