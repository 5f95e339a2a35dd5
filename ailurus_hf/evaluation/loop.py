"""Evaluating a segmentation model at several budgets side by side, on one process or several."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..benchmark import SpeedUp, count_flops, speed_up, time_side_by_side
from ..budget import has_budget, with_budget
from ..data.images import ImageFileError
from ..data.labelled import LabelledImage, LabelRule
from ..data.layouts import HubSegmentation, labelled_row
from ..modeling.configuration_lookupvit import size_on
from ..modeling.label_maps import class_names, num_classes
from ..registry import architecture_of, has_architecture
from .accumulator import Accumulator
from .boundary import BoundaryScore
from .inference import Segmentation, class_scores, segment_image
from .intervals import Interval, bootstrap_weights, mean_iou_of, percentiles
from .processes import gather, process_place
from .segmentation import Agreement, ConfusionMatrix, number_or_none

__all__ = ["BudgetResult", "EvaluationReport", "evaluate_segmentation"]


@dataclass
class BudgetResult:
    """What was measured at one budget.

    Attributes:
        budget: settings by name: `keep_ratio`, the share of tokens kept, of which 1 is dense, or of LookupViT
            `compressed_size`, (rows, columns); and others that hold beside it.
        confusion: counts of true and predicted classes.
        agreement: with the classes at the first budget, over all pixels.
        boundary: counts of boundary pixels, if they were asked for.
        seconds: from picture to label map, one entry for every picture.
        gflops: 1e9 floating-point operations of the model for the first picture, all its views and windows; None where
            they cannot be counted.
        per_picture: counts of every picture, of `confusion` and of `agreement`, if intervals were asked for.
    """

    budget: dict[str, Any]
    confusion: ConfusionMatrix
    agreement: Agreement
    boundary: BoundaryScore | None
    seconds: list[float] = field(default_factory=list)
    gflops: float | None = None
    per_picture: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def keep_ratio(self) -> float | None:
        """Share of tokens kept; None where the budget is another setting."""
        return self.budget.get("keep_ratio")

    @property
    def metrics(self) -> list[Accumulator]:
        """Those that are counted."""
        boundary = [] if self.boundary is None else [self.boundary]
        return [self.confusion, *boundary, self.agreement]


@dataclass
class EvaluationReport:
    """Results of all budgets, the one that the others are compared with first: dense, or the largest compressed size.

    Attributes:
        budgets: one result for every budget.
        id2label: names of the classes.
        num_pictures: how many pictures were evaluated.
        skipped: what was said of pictures that could not be read.
    """

    budgets: list[BudgetResult]
    id2label: dict[int, str]
    num_pictures: int
    skipped: list[str]

    def speed_up(self, result: BudgetResult) -> SpeedUp:
        """How many times faster than at the first budget, over the pictures."""
        return speed_up(self.budgets[0].seconds, result.seconds)

    def settings(self) -> list[str]:
        """Names of the settings in which the budgets differ."""
        return list(dict.fromkeys(name for result in self.budgets for name in result.budget))

    def rows(self) -> list[dict[str, Any]]:
        """One flat dictionary for every budget, a table's row: settings (a size in words, None where one is not given),
        scores, costs, and intervals if they were asked for."""
        return [self._row(result) for result in self.budgets]

    def intervals(self, result: BudgetResult) -> dict[str, Interval]:
        """95 % intervals by a paired bootstrap over pictures: of `mean_iou_difference`, to the first budget, and of
        `agreement`. None of them where they were not asked for."""
        if not result.per_picture:
            return {}
        weights = bootstrap_weights(len(result.per_picture))
        confusions = [np.stack([counts for counts, _ in each.per_picture]) for each in (result, self.budgets[0])]
        # Some resamples at a time: with many classes all of them together would not fit into memory.
        parts = [[mean_iou_of(np.tensordot(part, counts, 1)) for part in np.array_split(weights, 40)]
                 for counts in confusions]  # fmt: skip
        scores, dense = (np.concatenate(part) for part in parts)
        equal, pixels = (weights @ np.stack([agreement for _, agreement in result.per_picture])).T
        return {"mean_iou_difference": percentiles(scores - dense), "agreement": percentiles(equal / pixels)}

    def to_dict(self) -> dict[str, Any]:
        """Everything, with IoU and accuracy of every class, as JSON takes it."""
        summaries = (result.confusion.summary(self.id2label) for result in self.budgets)
        budgets = [row | summary for row, summary in zip(self.rows(), summaries, strict=True)]
        return {"pictures": self.num_pictures, "skipped": self.skipped, "budgets": budgets}

    def _row(self, result: BudgetResult) -> dict[str, Any]:
        gain = self.speed_up(result)
        row = {name: _in_words(result.budget.get(name)) for name in self.settings()}
        for metric in result.metrics:
            row |= {name: number_or_none(score) for name, score in metric.compute().items()}
        for name, interval in self.intervals(result).items():
            row |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        return row | {
            "gflops": result.gflops,
            "ms_per_picture": 1e3 * statistics.median(result.seconds),
            "speed_up": gain.median,
            "speed_up_low": gain.low,
            "speed_up_high": gain.high,
        }


def _in_words(setting: Any) -> Any:
    """A size as a table has it; anything else as it is."""
    return " x ".join(map(str, setting)) if isinstance(setting, tuple) else setting


def evaluate_segmentation(
    model: PreTrainedModel,
    image_processor: Any,
    samples: Sequence[LabelledImage] | Iterable[Any],
    budgets: Sequence[float | Mapping[str, Any]] | None = None,
    *,
    ignore_index: int | None = None,
    boundary: bool = False,
    intervals: bool = False,
    skip_unreadable: bool = False,
    progress: bool = True,
    **views: Any,
) -> EvaluationReport:
    """Quality, cost and speed of a model at several budgets.

    Every picture is predicted at all budgets in turn, so that their times are measured under the same conditions; the
    dense model is always among them, and what the others are compared with. Of LookupViT, where nothing is dense, the
    largest compressed size is. Label maps become counts at once. Launched on several processes, each takes every
    n-th picture and the counts are added up: the scores are those of one process, exactly, whether
    torch.distributed was set up before, a `PartialState`, an `Accelerator`, or nothing.

    Args:
        model: a semantic-segmentation model of this package, or one changed by `apply_ailurus`; any other at
            `budgets=[1]`.
        image_processor: its image processor.
        samples: pictures with labels, such as `ailurus_hf.data.SegmentationFolder`; or a data set of Hugging Face
            `datasets`, streamed or not, or rows of one, with names of columns that `HubSegmentation` looks for.
        budgets: shares of tokens to keep, above 0 and at most 1, or dictionaries of settings as `with_budget` takes
            them, such as `{"keep_ratio": 0.25, "grouping": "density_peaks"}` and `{"compressed_size": 5}`; None takes
            1, 0.5 and 0.25, of LookupViT the sizes of the training.
        ignore_index: label of pixels that do not count; None takes the model's.
        boundary: count boundary pixels too.
        intervals: keep the counts of every picture, for `EvaluationReport.intervals`.
        skip_unreadable: go on past samples whose files are damaged or too small for the model, and list them.
        progress: show a progress bar on stderr, on the first process.
        views: `sliding_window`, `flip`, `scales`: see `class_scores`.

    Raises:
        ValueError: there are no samples, or none could be read; labels outside the classes.
        TypeError: budgets other than 1 for a model that has none, or of the other kind; samples that are neither.
        ImageFileError: a file is damaged, or a picture smaller than a patch, and `skip_unreadable` is False.
    """
    index, processes = process_place()
    if ignore_index is None:
        ignore_index = getattr(model.config, "semantic_loss_ignore_index", 255)
    rule = LabelRule(num_classes(model.config), ignore_index)
    samples = HubSegmentation(samples, rule) if hasattr(samples, "column_names") else samples
    wanted = _budgets(model.config, budgets)
    results = _empty_results(wanted, num_classes(model.config), ignore_index, boundary)
    skipped: list[str] = []
    model.eval()
    # A bar is disabled by None where stderr is no terminal.
    share = _share(samples, index, processes)
    for number, read in tqdm(share, "evaluating", leave=False, disable=None if progress and not index else True):
        try:
            sample = _labelled(read(), number, rule)
            _evaluate_picture(model, image_processor, sample, results, intervals, views)
        except ImageFileError as error:
            if not skip_unreadable:
                raise
            skipped.append(str(error))
    for result in results:  # counts and times of all processes, in every process
        for metric in result.metrics:
            metric.add_processes()
        result.seconds = gather(result.seconds)
        result.gflops = next((gflops for gflops in gather([result.gflops]) if gflops is not None), None)
        result.per_picture = gather(result.per_picture)
    skipped = gather(skipped)
    if not results[0].seconds and not skipped:
        raise ValueError("samples must hold at least one picture with labels, got none")
    if not results[0].seconds:
        raise ValueError(f"none of the {len(skipped)} samples could be read; the first: {skipped[0]}")
    names = class_names(model.config.id2label, model.config.num_labels)
    return EvaluationReport(results, dict(enumerate(names)), len(results[0].seconds), skipped)


def _share(samples: Any, index: int, processes: int) -> Sequence[Any] | Iterator[Any]:
    """Number and reader of every n-th sample, not of a block of them: neighbours tend to be of one size, and the
    processes end together. Of a stream, which has no length, each process passes over the others' samples."""
    try:
        total = len(samples)
    except TypeError:
        return _share_of_stream(samples, index, processes)
    return [(number, partial(samples.__getitem__, number)) for number in range(index, total, processes)]


def _share_of_stream(samples: Iterable[Any], index: int, processes: int) -> Iterator[Any]:
    stream = iter(samples)
    for number in count():
        try:
            sample = next(stream)
        except StopIteration:
            return
        except ImageFileError as error:  # to be raised, or skipped, where the sample would be read
            sample = error
        if number % processes == index:
            yield number, partial(_or_raise, sample)


def _or_raise(sample: Any) -> Any:
    if isinstance(sample, Exception):
        raise sample
    return sample


def _labelled(sample: Any, number: int, rule: LabelRule) -> LabelledImage:
    """A sample as it is; a data set's row, whose picture and labels have usual names, read."""
    if isinstance(sample, Mapping):
        return labelled_row(sample, f"row {number}", rule)
    if not all(hasattr(sample, name) for name in LabelledImage._fields):
        raise TypeError(
            f"samples must be LabelledImage (image, labels, name) or rows of a data set, got {type(sample).__name__}"
        )
    return sample


def _budgets(config: Any, budgets: Sequence[float | Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Each budget once, the one that the others are compared with first."""
    compresses = has_architecture(config) and architecture_of(config).budget == "compressed_size"
    if budgets is None:
        sizes = config.fitting_sizes(config.position_grid) if compresses else ()
        budgets = [{"compressed_size": size} for size in sizes] if compresses else (0.5, 0.25)
    wanted: list[dict[str, Any]]
    wanted = [dict(budget) if isinstance(budget, Mapping) else {"keep_ratio": float(budget)} for budget in budgets]
    if wanted and all("compressed_size" in budget for budget in wanted):
        wanted = [{**budget, "compressed_size": size_on((1, 1), budget["compressed_size"])} for budget in wanted]
        wanted.sort(key=lambda budget: (-math.prod(budget["compressed_size"]), budget["compressed_size"]))
    else:  # all that is dense is one
        wanted = [{"keep_ratio": 1.0}, *(budget for budget in wanted if budget.get("keep_ratio") != 1)]
    return [budget for place, budget in enumerate(wanted) if budget not in wanted[:place]]


def _empty_results(
    budgets: list[dict[str, Any]], num_labels: int, ignore_index: int, boundary: bool
) -> list[BudgetResult]:
    return [
        BudgetResult(
            budget,
            ConfusionMatrix(num_labels, ignore_index),
            Agreement(),
            BoundaryScore(num_labels, ignore_index) if boundary else None,
        )
        for budget in budgets
    ]


def _evaluate_picture(
    model: PreTrainedModel,
    image_processor: Any,
    sample: LabelledImage,
    results: list[BudgetResult],
    intervals: bool,
    views: dict[str, Any],
) -> None:
    """Predict one picture at all budgets, and count."""
    found: dict[str, Segmentation] = {}

    def predict(name: str, budget: dict[str, Any]) -> None:
        # A model without budgets is dense as it is; asked for another one, it raises.
        dense = budget == {"keep_ratio": 1} and not has_budget(model)
        with nullcontext() if dense else with_budget(model, **budget):
            found[name] = segment_image(model, image_processor, sample.image, **views)

    names = [str(result.budget) for result in results]
    variants = {name: partial(predict, name, result.budget) for name, result in zip(names, results, strict=True)}
    first = not results[0].seconds
    try:
        times = time_side_by_side(variants, rounds=1, warmup=1 if first else 0)
    except ImageFileError as error:  # too small for the model
        raise ImageFileError(f"{sample.name}: {error}") from error
    truth = torch.as_tensor(sample.labels)
    # Counted after all budgets are timed.
    for name, result in zip(names, results, strict=True):
        labels = torch.as_tensor(found[name].labels)
        before = result.confusion.counts.clone(), result.agreement.counts.clone()
        try:
            result.confusion.update(labels, truth)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error
        result.agreement.update(labels, torch.as_tensor(found[names[0]].labels))
        if intervals:
            now = result.confusion.counts, result.agreement.counts
            confusion, agreement = ((new - old).numpy() for new, old in zip(now, before, strict=True))
            result.per_picture.append((confusion, agreement))
        if result.boundary is not None:
            result.boundary.update(labels, truth)
        result.seconds += times[name]
        if first:
            result.gflops = _gflops(model, image_processor, sample, result.budget, views)


def _gflops(
    model: PreTrainedModel, image_processor: Any, sample: LabelledImage, budget: dict[str, Any], views: dict[str, Any]
) -> float | None:
    """Of all the forwards that one picture takes."""
    if not has_architecture(model.config):
        return None
    height, width = image_processor(sample.image, return_tensors="pt")["pixel_values"].shape[-2:]
    run = partial(class_scores, **views)
    return count_flops(model, height, width, run, **budget) / 1e9
