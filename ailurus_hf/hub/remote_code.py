"""Checkpoints that bring their own code, for sharing on the Hub."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..modeling.image_processing_ailurus import AiluRusImageProcessor
from ..registry import architecture_of, has_architecture
from ..utils.files import atomic_directory
from .model_card import build_model_card
from .model_files import is_model_file


def save_with_code(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    image_processor: AiluRusImageProcessor | None = None,
    *,
    overwrite: bool = False,
    license: str = "apache-2.0",
    **save_kwargs: Any,
) -> Path:
    """Write a checkpoint that loads with `trust_remote_code=True` where this package is not installed.

    The folder holds weights, configuration, image processor, the package's modelling code, an `auto_map` that names
    every class of the family, and a model card. It is ready for `huggingface_hub.upload_folder`.

    Args:
        model: any model of this package.
        folder: where to write; must not exist unless `overwrite`.
        image_processor: the processor to store along; the default one when None.
        overwrite: replace an existing folder that holds nothing but what this package writes.
        license: licence of the weights, for the model card.
        save_kwargs: for `model.save_pretrained`, such as `max_shard_size`.

    Returns:
        The folder.

    Raises:
        TypeError: `model` is not one of this package's models.
        FileExistsError: `folder` exists and `overwrite` is False, or it holds something else.
    """
    if not has_architecture(getattr(model, "config", None)):
        raise TypeError(f"model must be one of this package's models, got {type(model).__name__}")
    image_processor = image_processor or AiluRusImageProcessor()
    with atomic_directory(folder, overwrite=overwrite, owns=is_model_file) as staging:
        model.save_pretrained(staging, **save_kwargs)
        image_processor.save_pretrained(staging)
        row = architecture_of(model.config)
        for auto_class in row.classes:  # with what their modules import relatively
            custom_object_save(row.load(auto_class), staging)
        custom_object_save(image_processor, staging)
        auto_map = {auto_class: _reference(path) for auto_class, path in row.classes.items()}
        _add_to_json(staging / "config.json", auto_map=auto_map)
        processor = _reference(f"{type(image_processor).__module__}:{type(image_processor).__name__}")
        _add_to_json(staging / "preprocessor_config.json", auto_map={"AutoImageProcessor": processor})
        card = build_model_card(
            model.config, license=license, model_class=type(model).__name__, remote_code=True, repo=Path(folder).name
        )
        card.save(staging / "README.md")
    return Path(folder)


def _reference(path: str) -> str:
    """The class at "package.module:Class" as `auto_map` names it: "module.Class"."""
    return path.rpartition(".")[2].replace(":", ".")


def _add_to_json(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
