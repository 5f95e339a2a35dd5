"""The model card (`README.md`) of a saved AiluRus checkpoint."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..architectures.row import FEATURES, SEGMENTATION, TASKS
from ..registry import architecture_of

__all__ = ["CardResult", "CardSource", "build_model_card"]

PROJECT_TAGS = ["ailurus", "vision-transformer", "token-reduction"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # what the Hub takes for a base model's name
TEMPLATE = Path(__file__).with_name("model_card_template.md")


@dataclass(frozen=True)
class CardSource:
    """Where a converted checkpoint comes from.

    Args:
        title: the source project, such as "official Segmenter".
        file_name: the file the weights come from, without its folder.
        sha256: its hash, in hexadecimal.
        url: the source project's page.
        citation: BibTeX of its paper, or "".
    """

    title: str
    file_name: str
    sha256: str
    url: str = ""
    citation: str = ""


@dataclass(frozen=True)
class CardResult:
    """Quality at one budget.

    Args:
        keep_ratio: share of tokens kept; 1 is dense. None for the budget that the configuration has.
        mean_iou: mean intersection over union, 0 to 1.
        pixel_accuracy: share of right pixels, 0 to 1.
    """

    keep_ratio: float | None
    mean_iou: float
    pixel_accuracy: float


def build_model_card(
    config: Any,
    *,
    source: CardSource | None = None,
    license: str = "unknown",
    model_class: str = "AiluRusForSemanticSegmentation",
    remote_code: bool = False,
    repo: str = "path/to/this/folder",
    dataset: str = "unknown",
    results: Sequence[CardResult] = (),
    training: Mapping[str, Any] | None = None,
    adapter_of: str | None = None,
) -> ModelCard:
    """Build the model card of a checkpoint: what it is, its budget, results, how to load it, licence and citation.

    Args:
        config: the model's configuration.
        source: where converted weights come from; `None` for weights trained with this package.
        license: licence of the weights, an identifier that the Hugging Face Hub knows.
        model_class: public name of the model class.
        remote_code: whether the folder carries the model's code, for loading without this package.
        repo: name or path shown in the loading example.
        dataset: name of the data set that the results were measured on.
        results: quality at one or several budgets, also listed in the card's metadata.
        training: settings of the training run, name -> value.
        adapter_of: for an adapter of peft, the folder or the name of the model that it is for.

    Raises:
        TypeError: `config` is not one of this package's.
    """
    row = architecture_of(config)
    auto_class = row.models.get(model_class, SEGMENTATION)
    task = TASKS[auto_class]
    data = ModelCardData(
        license=license,
        library_name="peft" if adapter_of else "transformers",
        base_model=adapter_of if adapter_of and _REPOSITORY.fullmatch(adapter_of) else None,
        pipeline_tag=task,
        tags=PROJECT_TAGS,
        model_name=repo if results else None,
        eval_results=_metadata(results, task, dataset),
    )
    classes = [] if task == FEATURES else [f"- Classes: {config.num_labels}."]
    if task == TASKS[SEGMENTATION] and config.num_labels == 1:
        classes = ["- Classes: background and foreground, by one channel."]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        source=source,
        model_class=model_class,
        description="\n".join([*row.card(config), *classes]),
        dataset=dataset,
        results=results,
        training=training,
        remote_code=remote_code,
        load_class=auto_class if remote_code else model_class,
        budget=row.example,
        citation=row.citation,
        repo=repo,
        adapter_of=adapter_of,
    )


def _metadata(results: Sequence[CardResult], task: str, dataset: str) -> list[EvalResult] | None:
    """The results in the form that the Hub reads."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset.lower().replace(" ", "-"),
            dataset_name=dataset,
            metric_type=kind,
            metric_name=name if result.keep_ratio is None else f"{name} (keep_ratio {result.keep_ratio:g})",
            metric_value=round(getattr(result, kind), 4),
        )
        for result in results
        for kind, name in (("mean_iou", "Mean IoU"), ("pixel_accuracy", "Pixel accuracy"))
    ] or None
