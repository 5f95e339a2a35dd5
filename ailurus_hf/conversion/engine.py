"""The conversion engine, shared by all recipes: read safely, apply rules, check strictly, write, verify, rename.

Each key of the source is consumed by exactly one rule, each rule is used (unless optional), and the result must have
exactly the tensors of the model that the source's settings describe. What fails leaves nothing on disk.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from ..hub.model_card import CardSource, build_model_card
from ..hub.model_files import is_model_file
from ..modeling.image_processing_ailurus import AiluRusImageProcessor
from ..modeling.label_maps import class_names
from ..utils.errors import CheckpointError, CheckpointWarning
from ..utils.files import atomic_directory, check_output_directory
from ..utils.logging import quiet_transformers
from .detection import choose_recipe
from .reading.files import file_sha256
from .reading.settings import check_sizes
from .reading.sources import weight_files
from .recipe import Plan, SourceCheckpoint, cluster_layer_of
from .recipes import RECIPES
from .report import ConversionReport, KeyRow
from .rules import Drop, Flatten, Rename, Rule, SplitRows, Transpose, fill, match, source_of
from .verification import float_dtype, verify_checkpoint

__all__ = ["KeyMapping", "check_rules_used", "convert_checkpoint", "map_keys"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)
_SHOWN = 4  # keys named in an error before "and N more"


@dataclass(frozen=True)
class KeyMapping:
    """One source key, the rule that consumes it and the names it gets (none if dropped)."""

    source: str
    rule: Rule
    targets: tuple[str, ...]


def convert_checkpoint(
    recipe: str,
    source: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    verify: bool = True,
    dry_run: bool = False,
    license: str | None = None,
    entry: str | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> ConversionReport:
    """Convert a checkpoint of another project into an AiluRus checkpoint that `from_pretrained` loads.

    The folder holds `config.json`, the weights as safetensors, `preprocessor_config.json` and a model card. It appears
    only when everything succeeded.

    Args:
        recipe: the source format: "segmenter", "transformers", "timm", "dino", "dinov2", "mae", "mmseg", "segformer",
            "ailurus"; or "auto" to recognise it.
        source: the checkpoint: a folder, a file, or for some recipes a name on the Hub.
        output: the folder to write.
        overwrite: replace an existing checkpoint folder of this package that holds nothing else.
        dtype: dtype of the saved weights, "float32", "float16" or "bfloat16"; by default the source's.
        max_shard_size: largest weight file, such as "5GB".
        verify: load the result again and compare its output, with nothing merged, with the source's own formulas (and
            with outputs recorded in a `golden.safetensors` beside the source); more than 1e-4 is an error.
        dry_run: check everything and return the report, but write nothing.
        license: licence of the weights for the model card, an identifier that the Hugging Face Hub knows; by default
            what the source says, else "unknown".
        entry: name of the weights' entry in the file, where it holds several, such as "state_dict_ema"; by default the
            one that is not averaged (of DINO and DINOv2 the teacher).
        progress: called with a short text at each step.
        settings: fields of the model's configuration to set: `keep_ratio`, `cluster_layer` (default: what the
            method does best with, or less when the model is too shallow), `id2label`, ...

    Returns:
        What was done.

    Raises:
        CheckpointError: the source is unreadable or unsafe, does not fit its settings, or fails verification.
        FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError: about source or output.
        ValueError, TypeError: about an argument.
    """
    tell = progress or (lambda text: None)
    target_dtype = _parse_dtype(dtype)
    _check_shard_size(max_shard_size)
    _check_output(output, source, overwrite)
    tell(f"reading {source}")
    recipe, weights, recognised = choose_recipe(recipe, source)
    checkpoint = replace(RECIPES[recipe].read(weights, entry), overrides=settings)
    plan = RECIPES[recipe].plan(checkpoint)
    tell(f"mapping {len(checkpoint.tensors)} tensors")
    skeleton = _build_skeleton(plan, settings, len(checkpoint.tensors))
    processor = _image_processor(plan, skeleton)
    plan = replace(plan, notes=checkpoint.notes + plan.notes + _label_notes(skeleton.config, plan))
    mappings = map_keys(plan.rules, checkpoint.tensors)
    tensors = _convert_tensors(plan, checkpoint, mappings, skeleton, target_dtype)
    not_finite = [m.source for m in mappings if not all(tensors[name].isfinite().all() for name in m.targets)]
    report = _report(recipe, plan, checkpoint, mappings, tensors, not_finite)
    report = replace(report, output=Path(output), recognised=recognised)
    if not dry_run:
        with atomic_directory(output, overwrite, is_model_file) as folder, quiet_transformers():
            tell(f"writing {output}")
            _save(folder, skeleton, tensors, processor, max_shard_size)
            _card(report, skeleton, license or plan.license or "unknown").save(folder / "README.md")
            if verify and not not_finite:
                tell("verifying: loading the result and comparing its output with the source's")
                report = replace(report, verification=verify_checkpoint(folder, plan, checkpoint, tensors))
        report = replace(report, written=True)
    for note in report.warnings:
        warn(note, CheckpointWarning, stacklevel=2)
    return report


def map_keys(rules: Sequence[Rule], keys: Iterable[str]) -> list[KeyMapping]:
    """Find the one rule that consumes each source key. Works on names alone.

    Raises:
        CheckpointError: no rule knows a key, or two source keys would get the same name.
        RuntimeError: two rules claim a key, a mistake in the recipe.
    """
    mappings, unknown = [], []
    taken: dict[str, str] = {}
    for key in keys:
        found = [(rule, values) for rule in rules if (values := match(rule, key)) is not None]
        if len(found) > 1:
            raise RuntimeError(f"{len(found)} rules of the recipe claim {key}: {[rule.pattern for rule, _ in found]}")
        if not found:
            unknown.append(key)
            continue
        rule, values = found[0]
        mapping = KeyMapping(key, rule, tuple(fill(target, values) for target in rule.targets))
        for target in mapping.targets:
            if target in taken:
                raise CheckpointError(f"{taken[target]} and {key} of the checkpoint would both become {target}")
            taken[target] = key
        mappings.append(mapping)
    if unknown:
        raise CheckpointError(f"the checkpoint holds {_count(unknown)} unknown to this recipe: {_some(unknown)}")
    return mappings


def check_rules_used(rules: Sequence[Rule], mappings: Sequence[KeyMapping]) -> None:
    """Check that each rule not marked optional consumed a key.

    Raises:
        CheckpointError: a rule found nothing, so the source is not of the kind that the recipe describes.
    """
    # equal rules count as one: frozen data has no identity
    used = {mapping.rule for mapping in mappings}
    idle = [rule.pattern for rule in rules if rule not in used and not rule.optional]
    if idle:
        raise CheckpointError(f"the checkpoint lacks what this recipe expects: no tensor matches {_some(idle)}")


def _convert_tensors(
    plan: Plan,
    checkpoint: SourceCheckpoint,
    mappings: Sequence[KeyMapping],
    skeleton: PreTrainedModel,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """The model's tensors by name, complete, of the right shapes, in one dtype, each with memory of its own."""
    tensors: dict[str, torch.Tensor] = {}
    for mapping in mappings:
        tensors |= zip(mapping.targets, _transform(mapping, checkpoint.tensors[mapping.source]), strict=True)
    _check_against_model(mappings, tensors, skeleton, plan.rules)
    if plan.bgr:
        tensors[_picture_kernel(skeleton)] = tensors[_picture_kernel(skeleton)].flip(1)
    check_rules_used(plan.rules, mappings)
    wanted = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    floats = [tensor.dtype for name, tensor in tensors.items() if wanted[name].is_floating_point]
    dtype = dtype or reduce(torch.promote_types, floats)  # of mixed dtypes the one that loses nothing
    skeleton.to(dtype)
    # Counters, as BatchNorm has them, stay whole numbers; safetensors refuses tensors that share memory, as the parts
    # of a split one do.
    return {
        name: tensor.to(dtype if wanted[name].is_floating_point else wanted[name], copy=True).contiguous()
        for name, tensor in tensors.items()
    }


def _transform(mapping: KeyMapping, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    match mapping.rule:
        case Rename():
            return (tensor,)
        case Drop():
            return ()
        case Transpose():
            if tensor.ndim != 2:
                raise CheckpointError(f"{mapping.source} must be a matrix, got shape {tuple(tensor.shape)}")
            return (tensor.T,)
        case Flatten():
            if tensor.ndim != 4 or tensor.shape[2:] != (1, 1):
                raise CheckpointError(f"{mapping.source} must be a 1 x 1 convolution, got shape {tuple(tensor.shape)}")
            return (tensor.flatten(1),)
        case SplitRows(targets=targets):
            if tensor.ndim == 0 or len(tensor) % len(targets) or len(tensor) == 0:
                raise CheckpointError(
                    f"{mapping.source} must have a number of rows that splits into {len(targets)} equal parts, "
                    f"got shape {tuple(tensor.shape)}"
                )
            return tensor.chunk(len(targets))


def _check_against_model(
    mappings: Sequence[KeyMapping],
    tensors: Mapping[str, torch.Tensor],
    skeleton: PreTrainedModel,
    rules: Sequence[Rule],
) -> None:
    """Check that the tensors are exactly the model's, in names and shapes; errors speak of the source's keys."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    extra = [m.source for m in mappings if any(target not in expected for target in m.targets)]
    if extra:
        raise CheckpointError(
            f"unexpected {_count(extra)} in the checkpoint: {_some(extra)}; its settings describe no such tensor"
        )
    missing = list(dict.fromkeys(_source_name(name, rules) for name in expected if name not in tensors))
    if missing:
        raise CheckpointError(f"missing {_count(missing)} in the checkpoint: {_some(missing)}")
    for mapping in mappings:
        for name in mapping.targets:
            if tuple(tensors[name].shape) != expected[name]:
                raise CheckpointError(
                    f"wrong shape of {mapping.source} in the checkpoint: it gives {name} the shape "
                    f"{tuple(tensors[name].shape)}, but the model of its settings needs {expected[name]}"
                )


def _picture_kernel(model: PreTrainedModel) -> str:
    """Name of the weight that meets the picture's channels, (out_channels, num_channels, height, width)."""
    return next(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def _source_name(target: str, rules: Sequence[Rule]) -> str:
    return next((name for rule in rules if (name := source_of(rule, target)) is not None), target)


def _build_skeleton(plan: Plan, settings: Mapping[str, Any], num_tensors: int) -> PreTrainedModel:
    """The model of the plan's settings and the user's, without memory for its weights."""
    config_class = plan.model_class.config_class
    known = {field.name for field in fields(config_class)} | {"id2label", "label2id", "num_labels"}
    known |= set(getattr(config_class, "aliases", ()))
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    merged = {**plan.config, **_label_settings(plan, settings)}
    check_sizes(merged, num_tensors)
    if "cluster_layer" not in merged:
        depth = merged["num_hidden_layers"] - merged.get("tail_layers", 0)
        merged["cluster_layer"] = cluster_layer_of(depth, merged)
    try:
        config = config_class(**merged)
    except StrictDataclassError as error:  # not a ValueError, and its text has several lines
        raise ValueError(" ".join(str(error).split())) from error
    try:
        with torch.device("meta"):
            return plan.model_class(config)
    except (RuntimeError, ValueError) as error:  # a tensor whose size no number holds; a head that refuses its settings
        raise CheckpointError(f"no model can be made of the settings: {str(error).splitlines()[0]}") from error


def _label_settings(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `id2label` checked against the source's number of classes, and `label2id` derived from it."""
    merged = dict(settings)
    names, palette = merged.pop("id2label", None), merged.get("palette")
    if plan.config.get("num_labels") == 1 and palette is not None and len(palette) == 2:
        merged["palette"] = palette[1:]  # of background and foreground, as of two names
    if names is None:
        return merged
    num_labels = plan.config.get("num_labels")
    if num_labels is None:
        raise ValueError("id2label cannot be set: the checkpoint has no classifier")
    try:
        id2label = {int(index): str(label) for index, label in dict(names).items()}
    except (TypeError, ValueError):
        raise ValueError(f"id2label must map class numbers to names, got {names!r}") from None
    if empty := [index for index, name in id2label.items() if not name.strip()]:
        raise ValueError(f"id2label must have a name for each class, got none for {_some(empty)}")
    if num_labels == 1:  # one channel: the name is the foreground's, class 1
        id2label = {0: id2label[max(id2label)]} if sorted(id2label) in ([0], [1], [0, 1]) else id2label
    if sorted(id2label) != list(range(num_labels)):
        raise ValueError(
            f"id2label must name the classes 0 to {num_labels - 1} of the checkpoint, got {_some(sorted(id2label))}"
        )
    return {**merged, "id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}


def _label_notes(config: Any, plan: Plan) -> tuple[str, ...]:
    """What may be meant in names and labels of a segmentation model or classifier, and often is not."""
    if plan.config.get("num_labels") is None:
        return ()
    if _segments(plan) and config.num_labels == 1:
        names = class_names(config.id2label, config.num_labels)
    else:
        names = [config.id2label[index] for index in range(config.num_labels)]
    notes: tuple[str, ...] = ()
    if empty := [index for index, name in enumerate(names) if not name.strip()]:
        notes += (f"no name for class {_some(empty)}; set them with --labels",)
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name.strip()]:
        notes += (f"several classes have the name {_some(repeated)}",)
    ignored = config.semantic_loss_ignore_index if _segments(plan) else -1
    if 0 <= ignored < len(names):
        notes += (f"label {ignored} is left out of the loss, although it is the class {names[ignored]!r}",)
    return notes


def _segments(plan: Plan) -> bool:
    return plan.model_class.__name__.endswith("ForSemanticSegmentation")


def _image_processor(plan: Plan, skeleton: PreTrainedModel) -> AiluRusImageProcessor:
    """The image processor of the plan's settings.

    Raises:
        CheckpointError: a setting is not valid.
    """
    settings = dict(plan.processor)
    if _segments(plan) and skeleton.config.num_labels == 1:
        settings["binary_threshold"] = skeleton.config.binary_threshold  # what pipelines ask for classes
    try:
        processor = AiluRusImageProcessor(**settings)
        # the sizes and filters that a file names are looked at only where they are used
        if skeleton.config.num_channels == 3:
            processor(torch.zeros(3, 8, 8, dtype=torch.uint8))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the image processor's settings are not valid: {_one_line(error)}") from error
    return processor


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _save(
    folder: Path,
    skeleton: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    processor: AiluRusImageProcessor,
    max_shard_size: str | int,
) -> None:
    # under the very names of `state_dict`: by default transformers turns names back into an older format it knows of
    skeleton.save_pretrained(
        folder, state_dict=dict(tensors), max_shard_size=max_shard_size, save_original_format=False
    )
    processor.save_pretrained(folder)


def _card(report: ConversionReport, skeleton: PreTrainedModel, license: str) -> ModelCard:
    recipe = RECIPES[report.recipe]
    source = CardSource(recipe.title, report.source.name, report.sha256, recipe.url, recipe.citation)
    return build_model_card(skeleton.config, source=source, license=license, model_class=type(skeleton).__name__)


def _report(
    recipe: str,
    plan: Plan,
    checkpoint: SourceCheckpoint,
    mappings: Sequence[KeyMapping],
    tensors: Mapping[str, torch.Tensor],
    not_finite: Sequence[str],
) -> ConversionReport:
    notes = plan.notes
    if not_finite:
        notes += (
            f"NaN or infinite weights in {_some(not_finite)}: the model's output will not be usable, "
            "and the result cannot be verified",
        )
    return ConversionReport(
        recipe=recipe,
        source=checkpoint.weights_path,
        sha256=file_sha256(*weight_files(checkpoint.weights_path)),
        output=Path(),
        written=False,
        dtype=str(float_dtype(tensors)).removeprefix("torch."),
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        dropped={mapping.source: mapping.rule.reason for mapping in mappings if isinstance(mapping.rule, Drop)},
        warnings=notes,
        key_table=tuple(
            KeyRow(m.source, tuple(checkpoint.tensors[m.source].shape), type(m.rule).__name__, m.targets)
            for m in mappings
        ),
        verification=None,
        model_class=plan.model_class.__name__,
        assumptions=plan.assumptions,
    )


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]  # the membership test tells what mypy cannot see
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    return DTYPES[dtype]


def _check_shard_size(size: str | int) -> None:
    if isinstance(size, bool) or not (
        (isinstance(size, int) and size > 0) or (isinstance(size, str) and _SHARD_SIZE.fullmatch(size.strip()))
    ):
        raise ValueError(f"max_shard_size must be a size such as '5GB' or '500MB', got {size!r}")


def _check_output(output: str | Path, source: str | Path, overwrite: bool) -> None:
    """Check the output before the long work starts."""
    # --overwrite removes the folder, and the source with it
    target = check_output_directory(output, overwrite, is_model_file)
    if target in (path := Path(os.path.realpath(source)), *path.parents):
        raise ValueError(f"output must not be the source or a folder around it, got {output}")


def _count(keys: Sequence[str]) -> str:
    return "key" if len(keys) == 1 else f"{len(keys)} keys"


def _some(keys: Sequence[Any]) -> str:
    shown = ", ".join(map(str, keys[:_SHOWN]))
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
