"""Reading JSON, and writing files and folders so that a run killed at any moment leaves nothing half-written.

Everything is written to a temporary sibling (same folder, so same file system) and takes its name in one step at the
end: the output either holds everything or does not change. What is there already is replaced only if this program wrote
it. What a killed run leaves beside its output is removed by the next run.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: leftovers stay
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MARK",
    "atomic_directory",
    "atomic_file",
    "check_output_directory",
    "check_output_file",
    "is_marked",
    "read_json_object",
    "remove_leftovers",
]

MARK = "written by ailurus-hf"  # in every file that a command writes, where its format has a place for it
_MARKED_BYTES = 4096  # formats have their remarks at the beginning or the end
_LEFTOVER = re.compile(r"\.(.*)\.[0-9a-f]{12}\.(tmp|old)(\.[^.]*)?")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def read_json_object(path: Path, wanted: str, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        wanted: what the object should hold, for the message.
        error: what to raise where it does not hold one, or no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{path} is not a readable JSON file: it is nested too deeply") from None
    except ValueError as fault:  # bad JSON, or not UTF-8
        raise error(f"{path} is not a readable JSON file: {fault}") from fault
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object with {wanted}, got {type(content).__name__}")
    return content


def is_marked(path: Path) -> bool:
    """Whether a file carries `MARK`: a command of this program wrote it, and nothing has rewritten it since."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_MARKED_BYTES)
        file.seek(max(0, path.stat().st_size - _MARKED_BYTES))
        return MARK.encode() in start or MARK.encode() in file.read(_MARKED_BYTES)


def check_output_directory(
    path: str | os.PathLike[str], overwrite: bool = False, owns: Callable[[Path], bool] | None = None
) -> Path:
    """Check that a folder may be written at `path`, before any long work starts; nothing is changed on disk.

    Args:
        path: the folder to write. Symbolic links are followed.
        overwrite: whether an existing folder may be replaced.
        owns: whether this program wrote a file of the folder. A folder that holds anything else is not replaced, so
            that a mistyped path cannot delete somebody's documents. None for folders that are only added to.

    Returns:
        The resolved path.

    Raises:
        FileExistsError: the folder exists and `overwrite` is false, or it holds something that is not this program's.
        NotADirectoryError: `path`, or a part of it, is a file.
        PermissionError: the folder in which it would be created is not writable.
        OSError: `path` leads into a loop of links.
    """
    resolved = _resolved(path)
    if resolved.is_dir():
        if not overwrite:
            raise FileExistsError(f"{path} exists already; choose another output, or overwrite=True replaces it")
        if owns is not None:
            _check_owned(path, resolved, owns)
        if not os.access(resolved, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot write {path}: the folder is read-only; choose another output")
    elif os.path.lexists(resolved):
        raise NotADirectoryError(f"{path} is a file, so no folder can be written there; choose another output")
    _check_parent(resolved)
    return resolved


def check_output_file(path: str | os.PathLike[str], owns: Callable[[Path], bool] | None = None) -> Path:
    """Check that a file may be written at `path`, before any long work starts; nothing is changed on disk.

    Args:
        path: the file to write. Symbolic links are followed.
        owns: whether this program wrote the file that is there; None replaces any.

    Returns:
        The resolved path.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileExistsError: there is a file that this program did not write.
        NotADirectoryError, PermissionError, OSError: as in [`check_output_directory`].
    """
    target = _resolved(path)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder, so no file can be written there; choose another output")
    if owns is not None and os.path.lexists(target) and not owns(target):
        raise FileExistsError(
            f"{path} is not replaced: this program did not write it; choose another output, or move the file away"
        )
    _check_parent(target)
    return target


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], overwrite: bool = False, owns: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which takes the name `path` when the block ends well.

    On any exception, `KeyboardInterrupt` included, the temporary folder and the parents created for it are removed and
    what was at `path` stays untouched. The arguments and errors are those of [`check_output_directory`].
    """
    target = _resolved(path)
    if target.parent.is_dir():
        remove_leftovers(target.parent, target)
    target = check_output_directory(path, overwrite, owns)
    created = _create_parents(target.parent)
    fresh = _sibling(target)
    try:
        fresh.mkdir()
        with _locked(fresh):
            yield fresh
            if owns is not None and target.is_dir():  # once more: the work may have taken hours
                _check_owned(path, target, owns)
            _swap(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        _remove_empty(created)
        raise


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], owns: Callable[[Path], bool] | None = None, tidy: bool = True
) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path` (same suffix), which takes its name when the block ends well.

    On any exception, `KeyboardInterrupt` included, the temporary file is removed and `path` stays untouched.

    Args:
        path, owns: as in [`check_output_file`], with its errors.
        tidy: remove what a killed run left of this file; who writes many files does it once for the folder.
    """
    target = check_output_file(path, owns)
    created = _create_parents(target.parent)
    if tidy:
        remove_leftovers(target.parent, target)
    fresh = _sibling(target)
    try:
        fresh.touch()
        with _locked(fresh):
            yield fresh
            os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        _remove_empty(created)
        raise


def remove_leftovers(folder: Path, target: Path | None = None) -> None:
    """Remove what killed runs left in a folder, of one output or of all; what a living process works on stays.

    An old folder whose place nothing has taken gets its name back.
    """
    for path in folder.iterdir():
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or not _is_abandoned(path):
            continue
        name = found[1] + (found[3] or "")
        if target is not None and name != target.name:
            continue
        if found[2] == "old" and not os.path.lexists(folder / name):
            os.rename(path, folder / name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _check_owned(path: str | os.PathLike[str], folder: Path, owns: Callable[[Path], bool]) -> None:
    foreign = next((file for file in sorted(folder.iterdir()) if not owns(file)), None)
    if foreign is not None:
        raise FileExistsError(
            f"{path} is not replaced, even with overwrite=True: this program did not write {foreign.name} in it; "
            "choose another output or delete the folder yourself"
        )


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        resolved = Path(path).resolve()
    except RuntimeError:  # what Python up to 3.12 raises
        resolved = Path(path)
    except ValueError as error:
        raise OSError(f"{path!r} cannot be the name of an output ({error})") from error
    for part in (resolved, *resolved.parents):
        try:
            os.stat(part)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(f"{path} leads into a loop of links; choose another output") from None
            if error.errno == errno.ENAMETOOLONG:
                raise OSError(f"{str(path)[:40]}... is too long a name for an output; choose another") from None
    return resolved


def _sibling(target: Path, kind: str = "tmp") -> Path:
    """A hidden, unused name beside `target`; the suffix stays last, since image writers choose their format by it."""
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}.{kind}{target.suffix}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a temporary file or folder."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _swap(fresh: Path, target: Path) -> None:
    """Put the folder `fresh` in the place of `target`; an old folder is put back if that fails half-way."""
    if not target.is_dir():
        os.rename(fresh, target)
        return
    if _exchange(fresh, target):
        shutil.rmtree(fresh, ignore_errors=True)
        return
    old = _sibling(target, "old")  # killed before the second rename, the next run gives it its name back
    try:
        os.rename(target, old)
        os.rename(fresh, target)
    except BaseException:
        if not target.exists():
            os.rename(old, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(done == 0)


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
