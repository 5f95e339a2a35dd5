"""Reading other people's checkpoints without running anything in them.

Weights come through safetensors or `torch.load(weights_only=True)`, settings through a YAML loader that builds plain
values only. What needs more than that is refused, with one line that names the file and the reason.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...utils.errors import CheckpointError

__all__ = [
    "RefusedError",
    "check_size",
    "file_sha256",
    "read_safetensors",
    "read_torch_file",
    "read_yaml",
    "state_dict_of",
    "strip_common_prefix",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the 8-bit ones come with scales of their own
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_COUNTER = ".num_batches_tracked"
_MAX_YAML_BYTES = 1_000_000  # the parser is slow and recursive; a settings file has some kilobytes
_MAX_VALUES = 100_000
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _PlainLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` plus tuples, which official Segmenter files need for `image_size: !!python/tuple`."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_PlainLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


class RefusedError(CheckpointError):
    """torch's safe loader found a sound file, but not only tensors and plain containers in it."""


def read_torch_file(path: Path) -> Any:
    """Read a `torch.save` file (zip or the old format) on the CPU: tensors and plain containers.

    Raises:
        RefusedError: torch's safe loader refuses the file.
        CheckpointError: the file is empty or damaged.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about old pickle protocols, useless to whoever converts
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise whatever their bytes happen to spell
        # torch has one exception for both, so its words must tell refusal from damage
        needed = _GLOBAL.search(str(error))
        if needed is not None:
            raise RefusedError(
                f"{path} is refused: unpickling it would need {needed[1]!r}, which may run code; "
                "only tensors and plain containers are read (torch.load(weights_only=True))"
            ) from error
        if "weights only" in str(error).lower():
            more = "or one that holds more than tensors and plain containers"
            raise RefusedError(f"{path} is refused: it is no PyTorch checkpoint, {more}") from error
        raise CheckpointError(f"{path} is damaged or cut short: it cannot be read as a PyTorch checkpoint") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file on the CPU. It is never tried as a pickle, whatever its bytes look like.

    Raises:
        CheckpointError: the file is not a complete safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged, cut short or no safetensors file ({error}); it is not tried as a pickle"
        ) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of plain values (and tuples).

    Raises:
        CheckpointError: the file is too large, no valid YAML, no mapping, or asks for objects that could run code.
    """
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise CheckpointError(f"{path} is refused: larger than {_MAX_YAML_BYTES} bytes, so no settings file")
    try:
        # _PlainLoader is a SafeLoader with one more constructor, which builds tuples
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except yaml.constructor.ConstructorError as error:
        raise CheckpointError(
            f"{path} is refused: {error.problem}; only plain values and tuples are read from it"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable YAML file: {_first_line(error)}") from error
    check_size(settings, path)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold a YAML mapping of settings, got {type(settings).__name__}")
    return settings


def check_size(settings: Any, source: object) -> None:
    """Refuse settings that refer to themselves, or so often to each other that even an error could not print them.

    Raises:
        CheckpointError: there are more than 100,000 values, each counted as often as it is referred to.
    """
    waiting, count = [settings], 0
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        count += 1
        if count > _MAX_VALUES:
            raise CheckpointError(f"{source} is refused: it holds more than {_MAX_VALUES} values, so no settings")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def state_dict_of(data: Any, path: Path, entry: str) -> dict[str, torch.Tensor]:
    """Take the tensors out of what a checkpoint file holds: `data[entry]`, or `data` itself if it holds only tensors.

    What wrapped the model and stands before every name is taken off, see [`strip_common_prefix`].

    Raises:
        CheckpointError: there is no such entry, it is empty, or something in it is not a dense tensor with a name.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a dictionary with the entry {entry!r}")
    if entry in data:
        tensors = data[entry]
    elif data and all(isinstance(value, torch.Tensor) for value in data.values()):
        tensors = data
    else:
        found = ", ".join(map(repr, list(data)[:8])) or "nothing"
        raise CheckpointError(f"{path} has no entry {entry!r} with the weights; it holds {found}")
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path}: the entry {entry!r} holds no tensors")
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, path)
    return strip_common_prefix(tensors)


def _check_tensor(key: Any, tensor: Any, path: Path) -> None:
    if not isinstance(key, str):
        raise CheckpointError(f"{path}: the tensor names must be strings, got {key!r}")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: {key} must be a tensor, got {type(tensor).__name__}")
    # BatchNorm counts its batches: the one tensor of a vision transformer's decoder that is a whole number.
    right_dtype = tensor.dtype in _FLOATS or (key.endswith(_COUNTER) and tensor.dtype == torch.int64)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or not right_dtype:
        raise CheckpointError(f"{path}: {key} must be a dense floating-point tensor, got {tensor.dtype}")


def strip_common_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off what wraps a model and stands before every name: `module.` of `DistributedDataParallel`, `_orig_mod.` of
    `torch.compile`, `model.` of training frameworks; in any order, as often as every name has it."""
    stripped = dict(tensors)
    while prefix := next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in stripped)), None):
        if not stripped:
            break
        stripped = {key.removeprefix(prefix): tensor for key, tensor in stripped.items()}
    return stripped


def file_sha256(*paths: Path) -> str:
    """The SHA-256 of a file, or of several one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
