"""Metrics for the `evaluate` library that keep counts, never predictions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..utils.extras import needs_extra

with needs_extra("eval", "metrics for `evaluate`"):
    import datasets
    import evaluate

__all__ = ["StreamingMetric", "load_metric", "metric_names"]

FOLDER = Path(__file__).parent / "metrics"


class StreamingMetric(evaluate.Metric, ABC):
    """A metric that turns each picture into counts when it is added.

    `evaluate` would write what is added to a file and read it all back in `compute`, which for label maps and depth
    maps is slow and large. `add`, `add_batch`, `compute` and `evaluate.combine` work as with any metric. After
    `compute` the counts start anew.

    Subclasses give `about`, the metric's description, `reset`, `update` and `result`.

    Args:
        config_name, num_process, process_id, experiment_id, kwargs: as in `evaluate.Metric`; only `num_process=1`,
            since every process adds up its own counts: see `evaluate_segmentation` for several.

    Raises:
        ValueError: `num_process` above 1.
    """

    about: ClassVar[str]
    value_type: ClassVar[str] = "int64"

    def __init__(self, config_name: str | None = None, num_process: int = 1, **kwargs: Any) -> None:
        if num_process != 1:
            raise ValueError(
                f"num_process must be 1, got {num_process}: every process would compute its own share's result; "
                "use ailurus_hf.evaluation.evaluate_segmentation, which adds up the counts of all processes"
            )
        super().__init__(config_name=config_name, num_process=1, **kwargs)
        self.reset()

    @abstractmethod
    def reset(self) -> None:
        """Start anew."""

    @abstractmethod
    def update(self, prediction: torch.Tensor, reference: torch.Tensor) -> None:
        """Add one picture: two maps (height, width)."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """Scores by name."""

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one picture: two maps (height, width), arrays, tensors or nested lists."""
        _refuse(kwargs)
        self.update(_tensor("prediction", prediction), _tensor("reference", reference))

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
        scores = self.result()
        self.reset()
        return scores

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value(self.value_type)))
        return evaluate.MetricInfo(
            description=self.about,
            citation="",
            inputs_description="predictions and references: lists of maps (height, width)",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )


def metric_names() -> list[str]:
    """Names of the metrics that the package brings."""
    return sorted(folder.name for folder in FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file())


def load_metric(name: str, **settings: Any) -> evaluate.Metric:
    """Load a metric of this package with `evaluate.load`; needs no network.

    Args:
        name: "mean_iou", "boundary_f", "agreement" or "depth".
        settings: for the metric, such as `num_labels=150, ignore_index=255`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in metric_names():
        raise ValueError(f"name must be one of {', '.join(metric_names())}, got {name!r}")
    return evaluate.load(str(FOLDER / name), **settings)


def named_scores(name: str, scores: Iterable[float], id2label: Mapping[int, str] | None) -> dict[str, float]:
    """One entry for every class, `NAME/CLASS`, the form that loggers take."""
    return {f"{name}/{id2label[index] if id2label else index}": score for index, score in enumerate(scores)}


def _tensor(name: str, value: Any) -> torch.Tensor:
    if value is None:
        raise ValueError(f"{name} is missing")
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(
            f"unknown argument {', '.join(kwargs)}; settings such as num_labels are given when the metric is loaded"
        )
