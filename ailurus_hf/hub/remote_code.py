"""Checkpoints that bring their own code, for sharing on the Hub."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from ..auto import AUTO_MODELS
from ..modeling.image_processing_ailurus import AiluRusImageProcessor
from ..utils.files import atomic_directory
from .model_card import build_model_card


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
        overwrite: replace an existing folder.
        license: licence of the weights, for the model card.
        save_kwargs: for `model.save_pretrained`, such as `max_shard_size`.

    Returns:
        The folder.

    Raises:
        TypeError: `model` is not one of this package's models.
        FileExistsError: `folder` exists and `overwrite` is False.
    """
    if type(getattr(model, "config", None)) not in AUTO_MODELS:
        raise TypeError(f"model must be one of this package's models, got {type(model).__name__}")
    image_processor = image_processor or AiluRusImageProcessor()
    with atomic_directory(folder, overwrite=overwrite, marker="config.json") as staging:
        model.save_pretrained(staging, **save_kwargs)
        image_processor.save_pretrained(staging)
        # The configuration and the operations come along as relative imports of the modelling file.
        custom_object_save(model, staging)
        custom_object_save(image_processor, staging)
        _add_to_json(staging / "config.json", auto_map=_auto_map(type(model.config)))
        processor_map = {"AutoImageProcessor": _reference(type(image_processor))}
        _add_to_json(staging / "preprocessor_config.json", auto_map=processor_map)
        card = build_model_card(
            model.config, license=license, model_class=type(model).__name__, remote_code=True, repo=Path(folder).name
        )
        card.save(staging / "README.md")
    return Path(folder)


def _auto_map(config_class: type[Any]) -> dict[str, str]:
    models = {auto_class.__name__: _reference(model) for auto_class, model in AUTO_MODELS[config_class].items()}
    return {
        "AutoConfig": _reference(config_class),
        "AutoImageProcessor": _reference(AiluRusImageProcessor),
        **models,
    }


def _reference(cls: type[Any]) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def _add_to_json(path: Path, **entries: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
