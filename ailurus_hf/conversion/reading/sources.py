"""From what the user names (a file, a folder, a name on the Hub) to the contents of its files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download

from ...utils.errors import CheckpointError
from ..unsupported import refuse_unsupported
from .files import RefusedError, read_safetensors, read_torch_file, state_dict_of, strip_common_prefix
from .unpickling import read_tensors_from_pickle

__all__ = [
    "choose_entry",
    "find_weights",
    "license_of",
    "read_json",
    "read_json_beside",
    "read_tensors",
    "tensors_of",
    "weight_files",
]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SETTINGS = ["*.json", "README.md"]
_MAX_JSON_BYTES = 50_000_000
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "checkpoint.pth",
    "model_best.pth.tar",
)
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")
# entries that hold the same model's weights from another stage of training, where a file has several
TWINS = ("model", "state_dict", "model_ema", "state_dict_ema", "ema_state_dict")
PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "pad_size",
    "do_reduce_labels",
)  # settings of transformers' image processors that ours has too
RECORDED = "golden.safetensors"  # outputs recorded beside a checkpoint, no weights


def find_weights(source: str | Path, preferred: Sequence[str] = WEIGHT_NAMES, hub: bool = True) -> Path:
    """The weight file (or the index of the shards) that `source` names or holds.

    Args:
        source: a file, a folder, or a name on the Hub (`owner/name`), which is downloaded to the cache.
        preferred: file names to look for in a folder, the first that is there wins.
        hub: whether `source` may be a name on the Hub.

    Raises:
        FileNotFoundError: there is no such source, or the folder has no weights, or several and none preferred.
        CheckpointError: it is neither a file nor a folder.
    """
    place = _locate(source, hub)
    if place.is_file():
        return place
    for name in preferred:
        if (place / name).is_file():
            return place / name
    others = [p for p in sorted(place.iterdir()) if p.name.endswith(WEIGHT_SUFFIXES) and p.name != RECORDED]
    if len(others) == 1:
        return others[0]
    found = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"no {' or '.join(preferred[:1])} in {place}, which holds {found}; name the file itself if it is one of them"
    )


def _locate(source: str | Path, hub: bool) -> Path:
    """The file or folder that `source` names; of the Hub only settings and weights, safetensors where there are any."""
    path = Path(source)
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is neither a file nor a folder")
    if not hub or not _HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} does not exist" + ("; a name on the Hub is owner/name" if hub else ""))
    try:
        # two steps, since a repository with both formats would otherwise be downloaded twice over
        folder = Path(snapshot_download(str(source), allow_patterns=[*_SETTINGS, "model*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*_SETTINGS, "pytorch_model*.bin"]))
    except Exception as error:  # offline, no such repository, not allowed: whatever the HTTP client raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(f"{source} is no file or folder, and the Hub does not give it: {reason[0]}") from error
    return folder


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the tensors: `path`, or the shards it lists.

    Raises:
        CheckpointError: the index is malformed, or names files outside its folder.
        FileNotFoundError: a shard is missing.
    """
    if path.suffix != ".json":
        return (path,)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} must list the shards in 'weight_map'")
    # an index is a stranger's text too: it must not make us read files elsewhere, nor follow it to another index
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name or Path(name).suffix == ".json" for name in names):
        raise CheckpointError(f"{path} is refused: its shards must be files of the same folder, got {names[0]!r}")
    for name in names:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} lists {name}, which is not there")
    return tuple(path.parent / name for name in names)


def read_tensors(path: Path, objects: bool = False) -> Mapping[str, Any]:
    """What a weight file, or all the shards of an index, hold.

    Args:
        path: from [`find_weights`].
        objects: whether a file may hold other objects beside the tensors; they become placeholders.

    Raises:
        CheckpointError: a file is unreadable, unsafe, or holds no dictionary.
    """
    content: dict[str, Any] = {}
    for file in weight_files(path):
        part = read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file, objects)
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{file} holds a {type(part).__name__}, expected a dictionary of tensors")
        content |= part
    return content


def _read_pickled(path: Path, objects: bool) -> Any:
    """torch's own safe reader first; the placeholders only where it refuses objects, not where it finds damage."""
    try:
        return read_torch_file(path)
    except RefusedError as refusal:
        if not objects:
            raise
        try:
            return read_tensors_from_pickle(path)
        except Exception as error:  # a damaged or hostile pickle raises whatever its bytes spell
            raise refusal from error


def choose_entry(
    content: Mapping[str, Any], path: Path, entries: Sequence[str], wanted: str | None
) -> tuple[str, tuple[str, ...]]:
    """The entry of a file's dictionary whose tensors are the weights.

    Args:
        content: what the file holds.
        path: the file, for messages.
        entries: names to look for; the first that is there wins.
        wanted: the one that the user names; `None` where they name none.

    Returns:
        Its name (the first of `entries` where none is there), and a note where other entries hold the same weights
        from another stage of training, such as their moving average.

    Raises:
        CheckpointError: the entry that the user names is not there.
    """
    if wanted is not None and not isinstance(content.get(wanted), Mapping):
        found = ", ".join(repr(name) for name, value in content.items() if isinstance(value, Mapping)) or "none"
        raise CheckpointError(f"{path} has no entry {wanted!r} with tensors; its entries are {found}")
    entry = wanted or next((name for name in entries if isinstance(content.get(name), Mapping)), entries[0])
    twins = [name for name in TWINS if name != entry and _same_names(content.get(name), content.get(entry))]
    if wanted is not None or not twins:
        return entry, ()
    offers = " or ".join(f"entry={name!r} (--entry {name})" for name in twins)
    return entry, (
        f"the file holds weights in {_listed([entry, *twins])}; {entry!r} was taken, {offers} takes the other",
    )


def _same_names(one: Any, other: Any) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    return {*strip_common_prefix(_named(one))} == {*strip_common_prefix(_named(other))}


def _named(entry: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if isinstance(key, str)}


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def tensors_of(content: Mapping[str, Any], path: Path, entry: str = "model") -> dict[str, torch.Tensor]:
    """The tensors of `content[entry]`, or of `content` itself; families that cannot be ported are refused first.

    Raises:
        CheckpointError: there are none, or they are of an unsupported family.
    """
    inner = content.get(entry, content)
    if isinstance(inner, Mapping):
        refuse_unsupported(path, (key for key in inner if isinstance(key, str)))
    return state_dict_of(content, path, entry)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is too large, no JSON, or no object.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is refused: larger than {_MAX_JSON_BYTES} bytes, so no settings file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_json_beside(weights: Path, name: str = "config.json", needed_by: str = "") -> dict[str, Any]:
    """Read a JSON object from the weights' folder; an empty one where there is no such file and nobody needs it.

    Args:
        needed_by: whose checkpoints do not come without it, for the message.

    Raises:
        FileNotFoundError: the file is missing and needed.
        CheckpointError: the file is too large, no JSON, or no object.
    """
    path = weights.parent / name
    if path.is_file():
        return read_json(path)
    if needed_by:
        raise FileNotFoundError(f"no {name} beside {weights}: {needed_by} checkpoints keep their settings there")
    return {}


def license_of(folder: Path) -> str | None:
    """The licence that the source's own model card names, or `None`."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        license = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:  # a card without or with broken metadata says nothing about the licence
        return None
    return license if isinstance(license, str) else None
