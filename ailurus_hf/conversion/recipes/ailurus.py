"""The recipe for AiluRus checkpoints: the weights stay, settings such as `keep_ratio` are written anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...architectures.row import Architecture
from ...modeling.image_processing_ailurus import AiluRusImageProcessor
from ...registry import ARCHITECTURES
from ...utils.errors import CheckpointError
from ..reading.files import state_dict_of
from ..reading.settings import config_of, model_class_names
from ..reading.sources import choose_entry, license_of, read_json_beside, read_tensors
from ..recipe import Plan, Preprocess, Recipe, Reference, Sign, SourceCheckpoint
from ..rules import Rename

__all__ = ["RECIPE", "plan_ailurus", "read_ailurus"]

RULES = (Rename("{name:*}", "{name}"),)
_NOT_FIELDS = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version")


def read_ailurus(weights: Path, entry: str | None = None) -> SourceCheckpoint:
    """Read `config.json` and the weights beside it.

    Raises:
        FileNotFoundError: `config.json` is missing.
        CheckpointError: a file is unreadable or unsafe, or no AiluRus checkpoint.
    """
    description = read_json_beside(weights, needed_by="AiluRus")
    if str(description.get("model_type")) not in ARCHITECTURES:
        allowed = " or ".join(map(repr, ARCHITECTURES))
        found = description.get("model_type")
        raise CheckpointError(f"{weights.parent / 'config.json'}: model_type must be {allowed}, got {found!r}")
    content = read_tensors(weights)
    entry, notes = choose_entry(content, weights, ("state_dict",), entry)
    return SourceCheckpoint(weights, state_dict_of(content, weights, entry), description, notes)


def plan_ailurus(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan: every tensor and every setting stays, but for those that the user sets.

    Raises:
        CheckpointError: `config.json` names no model of this package.
    """
    row = ARCHITECTURES[checkpoint.description["model_type"]]
    names = model_class_names(checkpoint.description)
    if not names or names[0] not in row.models:
        raise CheckpointError(f"config.json: architectures must name one of {', '.join(row.models)}, got {names!r}")
    auto_class = row.models[names[0]]
    config = _settings(checkpoint, row)
    processor = _processor(checkpoint.weights_path)
    output = "last_hidden_state" if auto_class == "AutoModel" else "logits"
    return Plan(
        config=config,
        rules=RULES,
        processor=processor,
        model_class=row.load(auto_class),
        reference=None if auto_class == "AutoBackbone" else _dense_forward(config, row, auto_class, output),
        preprocess=_preprocess(checkpoint.weights_path),
        output=output,
        pads_images=True,
        license=license_of(checkpoint.weights_path.parent),
    )


def _settings(checkpoint: SourceCheckpoint, row: Architecture) -> dict[str, Any]:
    """The fields that the file has, and those that the engine would otherwise choose itself."""
    config = config_of(row.load("AutoConfig"), checkpoint.description, len(checkpoint.tensors))
    # config.json may leave out defaults; those named below are read before a config is made of the rest
    written = {name: value for name, value in checkpoint.description.items() if name not in _NOT_FIELDS}
    return {
        **written,
        "grouping": config.grouping,
        "cluster_layer": config.cluster_layer,
        "num_labels": config.num_labels,
        "id2label": config.id2label,
        "label2id": config.label2id,
    }


def _processor(weights: Path) -> dict[str, Any]:
    settings = read_json_beside(weights, "preprocessor_config.json")
    return {name: value for name, value in settings.items() if not name.endswith("_type") and name != "auto_map"}


def _preprocess(weights: Path) -> Preprocess | None:
    """The source's own image processor; `None` where it has none."""
    if not (weights.parent / "preprocessor_config.json").is_file():
        return None
    processor = AiluRusImageProcessor.from_pretrained(weights.parent)

    def preprocess(picture: torch.Tensor) -> torch.Tensor:
        pixel_values: torch.Tensor = processor(picture, return_tensors="pt")["pixel_values"]
        return pixel_values

    return preprocess


def _dense_forward(config: Mapping[str, Any], row: Architecture, auto_class: str, output: str) -> Reference:
    """The model with its own settings, nothing merged: what the new settings must not change."""

    def forward(tensors: Mapping[str, torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        settings = row.load("AutoConfig")(**{**config, "keep_ratio": 1.0, "num_clusters": None})
        model = row.load(auto_class)(settings).to(pixel_values.dtype).eval()
        model.load_state_dict(dict(tensors))
        result: torch.Tensor = model(pixel_values)[output]
        return result

    return forward


RECIPE = Recipe(
    title="an AiluRus checkpoint",
    signs=(Sign("config.json with a model_type of this package", lambda e: e.model_type in ARCHITECTURES),),
    read=read_ailurus,
    plan=plan_ailurus,
)
