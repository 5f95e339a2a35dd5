"""Loading a checkpoint for a command, strictly: a fault is an error here, where `from_pretrained` would only warn."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from ..architectures.row import SEGMENTATION
from ..conversion.reading.settings import model_class_names
from ..registry import ARCHITECTURES
from ..utils.errors import CheckpointError
from ..utils.extras import needs_extra
from ..utils.files import read_json_object
from ..utils.logging import quiet_transformers

_SHOWN = 4


def load_model(
    path: str | Path, *, dtype: torch.dtype | str | None = None, any_head: bool = False, **settings: Any
) -> PreTrainedModel:
    """Load a checkpoint for inference.

    Args:
        path: a folder written by `save_pretrained` or `ailurus-hf convert`, or a name on the Hugging Face Hub; or the
            folder of an adapter of peft, which is merged into the model that it names.
        any_head: take whatever class `config.json` names; else only a segmentation model.
        dtype: dtype to load in; by default that of the file.
        settings: fields of the configuration to change; those that are `None` are left as they are.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such checkpoint folder, or no config or weights in it.
        CheckpointError: the config or the weights are damaged or of another kind, the model is not for segmentation, or
            tensors are missing, unexpected or of the wrong shape.
        ValueError: a setting is not allowed.
    """
    if os.path.lexists(path) or Path(path).is_absolute():
        if adapter_base(path) is not None:
            return _merged(Path(path), dtype=dtype, any_head=any_head, **settings)
        _check_folder(Path(path))
    chosen = {name: value for name, value in settings.items() if value is not None}
    model_class = _model_class(path, any_head)
    for name in chosen:
        if not hasattr(model_class.config_class, name):
            raise ValueError(f"{path} holds a {model_class.__name__}, which has no setting {name}; leave it out")
    try:
        with quiet_transformers():
            _check_parameters(path, model_class, chosen)
            # mismatched sizes are let through here only to be reported with the other faults below
            model, info = model_class.from_pretrained(
                path, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **chosen
            )
    except StrictDataclassError as error:  # not a ValueError, and its text has several lines
        raise ValueError(f"settings of {path}: {' '.join(str(error).split())}") from error
    except OSError:
        raise
    except Exception as error:  # whatever a setting makes of the code that takes it
        raise CheckpointError(f"no model can be made of the settings of {path}: {_in_words(error)}") from error
    _check_loading(path, info)
    return model.eval()


def adapter_base(path: str | Path) -> str | None:
    """What an adapter of peft in a folder is for: a folder or a name on the Hub; None where there is no adapter.

    Raises:
        CheckpointError: the adapter does not say.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    base = read_json_object(file, "base_model_name_or_path", CheckpointError).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path} holds an adapter of peft that names no model it is for (base_model_name_or_path in {file.name}); "
            "write the model's folder there, or merge them in Python: merge_and_unload(), save_pretrained()"
        )
    return base


def _merged(folder: Path, **settings: Any) -> PreTrainedModel:
    """The model that an adapter of peft is for, with the adapter merged into its weights."""
    base = adapter_base(folder)
    assert base is not None
    with needs_extra("peft", f"adapters such as {folder}, for {base},"):
        from peft import PeftModel
    model = load_model(base, **settings)
    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except OSError:
        raise
    except Exception as error:  # whatever a setting makes of the code that takes it
        raise CheckpointError(f"the adapter {folder} does not fit {base}: {_in_words(error)}") from error
    return merged.eval()


def _model_class(path: str | Path, any_head: bool) -> type[PreTrainedModel]:
    """The class that the checkpoint's configuration names; its segmentation class where it names none that is known.

    Raises:
        CheckpointError: the configuration is not one of this package's, or the class is not for segmentation.
    """
    try:
        config = PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError) as error:  # the name of a repository is checked with ValueErrors
        if Path(path).is_dir():
            raise
        first = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no folder {path}, and no model of that name on the Hub could be read: {first}"
        ) from error
    model_type = config.get("model_type")
    if str(model_type) not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: config.json must have model_type {' or '.join(map(repr, ARCHITECTURES))}, got {model_type!r}"
        )
    row = ARCHITECTURES[model_type]
    name = next(iter(model_class_names(config)), None)
    auto_class = SEGMENTATION if name is None else row.models.get(name, SEGMENTATION)
    if auto_class != SEGMENTATION and not any_head:
        wanted = row.classes[SEGMENTATION].rpartition(":")[2]
        raise CheckpointError(
            f"{path} holds {name}, which has no segmentation head; give a checkpoint of {wanted} "
            "(`ailurus-hf info` describes any)"
        )
    return row.load(auto_class)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        dead = f" is a link to {folder.readlink()}, which leads nowhere" if folder.is_symlink() else " does not exist"
        raise FileNotFoundError(f"{folder}{dead}; expected a checkpoint folder")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is a file; expected a checkpoint folder with config.json and model.safetensors"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no config.json; expected a folder written by save_pretrained or `ailurus-hf convert`"
        )
    read_json_object(folder / "config.json", "a model_type", CheckpointError)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors)")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error})") from error


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_parameters(path: str | Path, model_class: type[PreTrainedModel], settings: dict[str, Any]) -> None:
    """Refuse a configuration of far more parameters than the folder holds, before memory is taken for them."""
    if not Path(path).is_dir():
        return
    with torch.device("meta"):
        described = sum(weight.numel() for weight in model_class(_config(path, model_class, settings)).parameters())
    stored = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if described > 2 * stored + 1_000_000:
        raise CheckpointError(
            f"{path}: config.json describes a model of {described:,} parameters, but the weights are {stored:,}"
        )


def _config(path: str | Path, model_class: type[PreTrainedModel], settings: dict[str, Any]) -> PreTrainedConfig:
    return model_class.config_class.from_pretrained(path, **settings)


def _check_loading(path: str | Path, info: dict[str, Any]) -> None:
    """Turn transformers' loading report into an error that names the keys."""
    faults = (
        ("missing from", info["missing_keys"]),
        ("unexpected in", info["unexpected_keys"]),
        ("of the wrong shape in", [entry[0] for entry in info["mismatched_keys"]]),
    )
    for fault, keys in faults:
        if keys:
            names = sorted(keys)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(f"tensors {fault} the checkpoint {path}: {', '.join(names[:_SHOWN])}{more}")
