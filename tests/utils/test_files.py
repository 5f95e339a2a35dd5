"""Outputs appear whole or not at all."""

from pathlib import Path

import pytest

from ailurus_hf.utils import files
from ailurus_hf.utils.files import atomic_directory, atomic_file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("x")
        assert folder.parent == tmp_path / "a"
        assert not (tmp_path / "a" / "out").exists()
    assert names(tmp_path / "a") == {"out"}
    assert names(tmp_path / "a" / "out") == {"x"}


def test_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_directory_vanishes_on_any_exception(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "a" / "b" / "out") as folder:  # noqa: PT012
        (folder / "x").write_text("x")
        raise error
    assert names(tmp_path) == set()


def test_parents_that_others_use_meanwhile_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic_directory(tmp_path / "a" / "b" / "out"):  # noqa: PT012
        (tmp_path / "a" / "other").touch()
        raise ValueError
    assert names(tmp_path / "a") == {"other"}


def test_existing_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(FileExistsError, match=r"out exists already.*--overwrite"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        files.check_output_directory(tmp_path / "out", overwrite=True, marker="config.json")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path / "out") == {"old"}
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == {"new"}
    assert names(tmp_path) == {"out"}


def test_failing_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename, calls = files.os.rename, []

    def fail_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail_second)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").touch()
    assert len(calls) == 3
    assert names(tmp_path / "out") == {"old"}
    assert names(tmp_path) == {"out"}


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == {"new"}


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(NotADirectoryError, match="is a file"), atomic_directory(path, overwrite=True):
            pass
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_file(tmp_path / "file" / "x.png"):
        pass
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic_file(tmp_path):
        pass
    assert names(tmp_path) == {"file"}


def test_read_only_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="read-only"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(PermissionError, match="read-only"), atomic_file(tmp_path / "x.png"):
        pass
    assert names(tmp_path) == set()


def test_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x.png"
    for text in ("one", "two"):
        with atomic_file(target) as path:
            assert path.suffix == ".png"
            path.write_text(text)
    assert target.read_text() == "two"
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as path:  # noqa: PT012
        path.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "two"
    assert names(tmp_path / "a") == {"x.png"}
