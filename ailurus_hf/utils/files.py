"""Reading JSON, and writing files and folders so that an interrupted run leaves nothing half-written.

Everything is written to a temporary sibling (same folder, so same file system) and renamed at the end: the output
either holds everything or does not change.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_directory", "atomic_file", "check_output_directory", "read_json_object"]


def read_json_object(path: Path, wanted: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        wanted: what the object should hold, for the message.
        error: what to raise where it does not hold one, or no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:  # bad JSON, or not UTF-8
        raise error(f"{path} is not a readable JSON file: {fault}") from fault
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object with {wanted}, got {type(content).__name__}")
    return content


def check_output_directory(path: str | os.PathLike[str], overwrite: bool = False, marker: str | None = None) -> Path:
    """Check that a folder may be written at `path`, before any long work starts; nothing is changed on disk.

    Args:
        path: the folder to write. Symbolic links are followed.
        overwrite: whether an existing folder may be replaced.
        marker: when given, only an empty folder or one that holds a file of this name may be replaced, so that
            `--overwrite` with a mistyped path cannot delete somebody's documents.

    Returns:
        The resolved path.

    Raises:
        FileExistsError: the folder exists and `overwrite` is false, or it exists and does not look like an old output.
        NotADirectoryError: `path`, or a part of it, is a file.
        PermissionError: the folder in which it would be created is not writable.
    """
    resolved = Path(path).resolve()
    if resolved.is_dir():
        if not overwrite:
            raise FileExistsError(f"{path} exists already; choose another output or add --overwrite to replace it")
        if marker is not None and any(resolved.iterdir()) and not (resolved / marker).is_file():
            raise FileExistsError(
                f"{path} is not replaced, even with --overwrite: it holds other files and no {marker}; "
                "choose another output or delete the folder yourself"
            )
    elif os.path.lexists(resolved):
        raise NotADirectoryError(f"{path} is a file, so no folder can be written there; choose another output")
    _check_parent(resolved)
    return resolved


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], overwrite: bool = False, marker: str | None = None
) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` and rename it to `path` when the block ends well.

    On any exception, `KeyboardInterrupt` included, the temporary folder and the parents created for it are removed and
    what was at `path` stays untouched. The arguments and errors are those of [`check_output_directory`].
    """
    with _replacing(check_output_directory(path, overwrite, marker)) as fresh:
        fresh.mkdir()
        yield fresh


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path` (same suffix) and rename it to `path` when the block ends well.

    On any exception, `KeyboardInterrupt` included, the temporary file is removed and `path` stays untouched.

    Raises:
        IsADirectoryError: `path` is a folder.
        NotADirectoryError, PermissionError: as in [`check_output_directory`].
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder, so no file can be written there; choose another output")
    _check_parent(target)
    with _replacing(target) as fresh:
        yield fresh


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield an unused path beside `target`; what the block puts there replaces `target`, or is removed on failure."""
    created = _create_parents(target.parent)
    fresh = _sibling(target)
    try:
        yield fresh
        _swap(fresh, target)
    except BaseException:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)
        _remove_empty(created)
        raise


def _sibling(target: Path) -> Path:
    """A hidden, unused name beside `target`; the suffix stays last, since image writers choose their format by it."""
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.tmp{target.suffix}")


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`; an old folder is put back if that fails half-way."""
    if not target.is_dir():
        os.replace(fresh, target)
        return
    old = _sibling(target)
    try:
        os.rename(target, old)
        os.rename(fresh, target)
    except BaseException:
        if not target.exists():
            os.rename(old, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _check_parent(target: Path) -> None:
    """Check that the nearest existing folder above `target` is a folder in which this process may create files."""
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {target}: {parent} is a file, not a folder; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {target}: the folder {parent} is read-only; choose another output")


def _create_parents(parent: Path) -> list[Path]:
    """Create the missing folders down to `parent`; return them, innermost first."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # something else put a file there meanwhile: not ours to delete
            return
