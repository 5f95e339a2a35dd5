"""The model card (`README.md`) of a saved AiluRus checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..architectures.row import FEATURES, SEGMENTATION, TASKS
from ..registry import architecture_of

__all__ = ["AILURUS_CITATION", "CardResult", "CardSource", "build_model_card"]

PROJECT_TAGS = ["ailurus", "vision-transformer", "token-reduction"]
AILURUS_CITATION = """@inproceedings{li2023ailurus,
  title     = {AiluRus: A Scalable ViT Framework for Dense Prediction},
  author    = {Li, Jin and Wang, Yaoming and Zhang, Xiaopeng and Shi, Bowen and Jiang, Dongsheng and Li, Chenglin and
               Dai, Wenrui and Xiong, Hongkai and Tian, Qi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  note      = {arXiv:2311.01197}
}"""


@dataclass(frozen=True)
class CardSource:
    """Where a converted checkpoint comes from.

    Args:
        title: the source project, such as "official Segmenter".
        file_name: the file the weights come from, without its folder.
        sha256: its hash, in hexadecimal.
        url: the source project's page.
        citation: BibTeX of its paper, or "".
        recipe: name of the conversion recipe.
    """

    title: str
    file_name: str
    sha256: str
    url: str = ""
    citation: str = ""
    recipe: str = ""


@dataclass(frozen=True)
class CardResult:
    """Quality at one budget.

    Args:
        keep_ratio: share of tokens kept; 1 is dense.
        mean_iou: mean intersection over union, 0 to 1.
        pixel_accuracy: share of right pixels, 0 to 1.
    """

    keep_ratio: float
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

    Raises:
        TypeError: `config` is not one of this package's.
    """
    auto_class = architecture_of(config).models.get(model_class, SEGMENTATION)
    task = TASKS[auto_class]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=PROJECT_TAGS,
        model_name=repo if results else None,
        eval_results=_metadata(results, task, dataset),
    )
    sections = [
        f"# {_title(source, model_class)}",
        _description(config, source, task),
        *([f"## Results\n\n{_result_table(results, dataset)}"] if results else []),
        *([f"## Training\n\n{_settings_list(training)}"] if training else []),
        f"## How to load it\n\n{_usage(auto_class if remote_code else model_class, remote_code, repo)}",
        f"## Licence\n\n{_licence(license, source)}",
        f"## Citation\n\n{_citations(source)}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(results: Sequence[CardResult], task: str, dataset: str) -> list[EvalResult] | None:
    """The results in the form that the Hub reads."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset.lower().replace(" ", "-"),
            dataset_name=dataset,
            metric_type=kind,
            metric_name=f"{name} (keep_ratio {result.keep_ratio:g})",
            metric_value=round(getattr(result, kind), 4),
        )
        for result in results
        for kind, name in (("mean_iou", "Mean IoU"), ("pixel_accuracy", "Pixel accuracy"))
    ] or None


def _result_table(results: Sequence[CardResult], dataset: str) -> str:
    rows = [f"On {dataset}:", "", "| keep_ratio | mean IoU | pixel accuracy |", "|---|---|---|"]
    rows += [f"| {result.keep_ratio:g} | {result.mean_iou:.4f} | {result.pixel_accuracy:.4f} |" for result in results]
    return "\n".join(rows)


def _settings_list(training: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in training.items())


def _title(source: CardSource | None, model_class: str) -> str:
    return f"AiluRus from {source.title}" if source else model_class


def _description(config: Any, source: CardSource | None, task: str) -> str:
    lines = list(architecture_of(config).card(config))
    if task != FEATURES:
        binary = task == TASKS[SEGMENTATION] and config.num_labels == 1
        lines.append(
            "- Classes: background and foreground, by one channel." if binary else f"- Classes: {config.num_labels}."
        )
    if source is not None:
        origin = f"[{source.title}]({source.url})" if source.url else source.title
        lines.append(f"- Converted from {origin}: `{source.file_name}`, SHA-256 `{source.sha256}`.")
    return "\n".join(lines)


def _usage(load: str, remote_code: bool, repo: str) -> str:
    """How to load it with the class of this name, transformers' or this package's."""
    arguments = ", trust_remote_code=True" if remote_code else ""
    imports = [f"from ailurus_hf import {load}", "from transformers import AutoImageProcessor"]
    if remote_code:
        imports = [f"from transformers import AutoImageProcessor, {load}"]
    code = [
        "import torch",
        "from PIL import Image",
        *imports,
        "",
        f'processor = AutoImageProcessor.from_pretrained("{repo}"{arguments})',
        f'model = {load}.from_pretrained("{repo}", keep_ratio=0.25{arguments}).eval()',
        "",
        'inputs = processor(Image.open("photo.jpg"), return_tensors="pt")',
        "with torch.no_grad():",
        "    outputs = model(**inputs)",
    ]
    note = "" if remote_code else "Needs `pip install ailurus-hf`.\n\n"
    return note + "```python\n" + "\n".join(code) + "\n```"


def _licence(license: str, source: CardSource | None) -> str:
    if source is None:
        return f"The weights: `{license}`."
    return (
        f"The weights: `{license}`. They were converted, not changed, so the terms of the source checkpoint apply to "
        "them; set the `license` field above accordingly before publishing."
    )


def _citations(source: CardSource | None) -> str:
    entries = [AILURUS_CITATION] + ([source.citation] if source and source.citation else [])
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
