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
    with (
        pytest.raises(FileExistsError, match=r"out exists already.*overwrite=True"),
        atomic_directory(tmp_path / "out"),
    ):
        pass
    with pytest.raises(FileExistsError, match="did not write old in it"):
        files.check_output_directory(tmp_path / "out", overwrite=True, owns=lambda path: path.name != "old")
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

    monkeypatch.setattr(files, "_exchange", lambda *paths: False)
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


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "two renames"])
def test_killed_swaps_leave_the_old_folder_or_the_new_one(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ran last before the end: the next run removes what was left over."""

    class Killed(BaseException):
        pass

    def killed(*arguments: object, **settings: object) -> None:
        raise Killed

    target = tmp_path / "out.d"
    for text in ("one", "two"):
        if not exchange:
            monkeypatch.setattr(files, "_exchange", lambda *paths: False)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
            patch.setattr(files.shutil, "rmtree", killed)
            with atomic_directory(target, overwrite=True) as folder:
                (folder / text).touch()
                if text == "one":
                    raise Killed
            raise Killed
        leftovers = {name for name in names(tmp_path) if name != "out.d"}
        assert len(leftovers) == 1
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == ({"out.d"} if target.exists() else set())
        with atomic_directory(target, overwrite=True) as folder:
            (folder / text).touch()
    assert names(target) == {"two"}
    old = target.rename(tmp_path / ".out.0123456789ab.old.d")
    files.remove_leftovers(tmp_path)
    assert not old.exists()
    assert names(target) == {"two"}


def test_what_a_living_process_works_on_stays(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as first, atomic_file(tmp_path / "x.png") as second:
        files.remove_leftovers(tmp_path)
        assert first.exists()
        assert second.exists()


def test_foreign_files_that_come_during_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(FileExistsError, match="did not write letter in it"),
        atomic_directory(tmp_path / "out", overwrite=True, owns=lambda path: path.name != "letter"),
    ):
        (tmp_path / "out" / "letter").touch()
    assert names(tmp_path / "out") == {"letter"}


def test_marked_files_are_replaced_and_others_not(tmp_path: Path) -> None:
    for mark in (f"{files.MARK}{' ' * 20_000}", f"{' ' * 20_000}{files.MARK}"):
        (tmp_path / "x").write_text(mark)
        with atomic_file(tmp_path / "x", files.is_marked) as path:
            path.write_text("mine")
        with pytest.raises(FileExistsError, match="x is not replaced"), atomic_file(tmp_path / "x", files.is_marked):
            pass
        assert (tmp_path / "x").read_text() == "mine"
        (tmp_path / "x").unlink()


def test_loops_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "a" / "out"):
        with pytest.raises(OSError, match="loop of links"), atomic_directory(path, overwrite=True):
            pass
        with pytest.raises(OSError, match="loop of links"), atomic_file(path):
            pass
