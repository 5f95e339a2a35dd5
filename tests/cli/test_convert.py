"""`ailurus-hf convert` and what all subcommands share: help, errors, interruption."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ailurus_hf import AiluRusConfig
from ailurus_hf.cli.app import main
from ailurus_hf.conversion import engine
from ailurus_hf.utils import files
from tests.conversion.segmenter_files import segmenter_shapes, segmenter_variant, write_segmenter


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_segmenter(tmp_path / "source", segmenter_variant())
    return "source"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run, check that it fails as a user's mistake must, and return the line."""
    before = sorted(path for path in Path.cwd().rglob("*"))
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("ailurus-hf: error: ")
    assert sorted(path for path in Path.cwd().rglob("*")) == before
    return line


def test_what_is_printed(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "convert", "segmenter", source, "out")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["source", "sha256", "dropped", "verified", "written", "next"]
    assert lines[-1] == "next      ailurus-hf predict IMAGE --model out --keep-ratio 0.25 --out predictions"


def test_options_reach_the_config(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("names.json").write_text(json.dumps({"id2label": {str(i): f"class {i}" for i in range(5)}, "palette": []}))
    options = ["--keep-ratio", "0.25", "--cluster-layer", "1", "--labels", "names.json", "--dtype", "float16"]
    code, out, _ = run(
        capfd, "convert", "segmenter", source, "out", *options, "--max-shard-size", "100KB", "--no-verify"
    )
    assert code == 0
    assert "verified" not in out
    config = AiluRusConfig.from_pretrained("out")
    assert (config.keep_ratio, config.cluster_layer, config.id2label[3]) == (0.25, 1, "class 3")
    assert len(list(Path("out").glob("model-*.safetensors"))) > 1


def test_entry(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "its entries are 'model'" in refused(capfd, "convert", "segmenter", source, "out", "--entry", "model_ema")
    assert run(capfd, "convert", "segmenter", source, "out", "--entry", "model")[0] == 0


def test_json(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "convert", "segmenter", source, "out", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["output"] == "out"
    assert report["written"]
    assert report["num_tensors"] == len(load_file("out/model.safetensors"))
    assert report["verification"]["largest_difference"] < 3e-5
    assert {row["source"] for row in report["key_table"]} == set(segmenter_shapes(segmenter_variant()))


def test_dry_run(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "convert", "segmenter", source, "out", "--dry-run")
    assert code == 0
    assert not Path("out").exists()
    for name in segmenter_shapes(segmenter_variant()):
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
    assert "ailurus.layers.2.attention.v_proj.bias" in out
    assert "nothing written" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep-ratio", "0"], "keep_ratio"),
        (["--keep-ratio", "-1"], "keep_ratio"),
        (["--keep-ratio", "1.01"], "keep_ratio"),
        (["--keep-ratio", "nan"], "keep_ratio"),
        (["--keep-ratio", "half"], "--keep-ratio"),
        (["--cluster-layer", "-1"], "cluster_layer"),
        (["--cluster-layer", "3"], "cluster_layer"),
        (["--cluster-layer", "1.5"], "cluster-layer"),
        (["--dtype", "int8"], "dtype must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        (["--max-shard-size", "huge"], "max_shard_size must be a size such as '5GB' or '500MB', got 'huge'"),
        (["--labels", "nowhere.json"], "nowhere.json"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_options(options: list[str], said: str, source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capfd, "convert", "segmenter", source, "out", *options)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"id2label": ["a"]}', '{"id2label": {"0": "a"}}', "\xff"])
def test_bad_labels(content: str, source: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("names.json").write_text(content, encoding="latin-1")
    line = refused(capfd, "convert", "segmenter", source, "out", "--labels", "names.json")
    assert "id2label" in line or "names.json" in line


@pytest.mark.parametrize("arguments", [["convert"], ["convert", "segmenter"], ["convert", "segmenter", "source"]])
def test_missing_arguments(arguments: list[str], source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "Missing argument" in refused(capfd, *arguments)


def test_unknown_names(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "'auto', got 'timmm'" in refused(capfd, "convert", "timmm", source, "out")
    assert "No such command" in refused(capfd, "transmogrify")
    assert "nowhere does not exist" in refused(capfd, "convert", "segmenter", "nowhere", "out")


def test_output_that_exists(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, "convert", "segmenter", source, "out")[0] == 0
    line = refused(capfd, "convert", "segmenter", source, "out")
    assert "out exists already" in line
    assert "--overwrite" in line
    assert run(capfd, "convert", "segmenter", source, "out", "--overwrite")[0] == 0


def test_output_that_is_or_is_below_a_file(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    for options in ([], ["--overwrite"]):
        assert "file is a file" in refused(capfd, "convert", "segmenter", source, "file", *options)
        assert "is a file, not a folder" in refused(capfd, "convert", "segmenter", source, "file/out", *options)


def test_read_only_parent(source: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: permissions do not stop a superuser, who may well run these tests."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    assert "is read-only" in refused(capfd, "convert", "segmenter", source, "out")


def test_full_disk(source: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "_save", full)
    assert "No space left on device" in refused(capfd, "convert", "segmenter", source, "out")


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_interruption(
    how: str, source: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = engine._save

    def interrupted(folder: Path, *arguments: Any) -> None:
        save(folder, *arguments)
        assert (folder / "model.safetensors").is_file()
        if how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(engine, "_save", interrupted)
    code, out, err = run(capfd, "convert", "segmenter", source, "deep/out")
    assert (code, out) == (130, "")
    assert err.splitlines() == ["ailurus-hf: interrupted; nothing half-written was left behind"]
    assert [path.name for path in Path.cwd().iterdir()] == ["source"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_bugs_keep_their_traceback(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(engine, "_save", bug)
    with pytest.raises(KeyError):
        main(["convert", "segmenter", source, "out"])
    assert not Path("out").exists()


def test_messages_are_one_printable_line(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no where" in refused(capfd, "convert", "segmenter", "no\nwhere", "out")
    assert "\x1b" not in refused(capfd, "convert", "segmenter", "no\x1b[31mwhere", "out")


def test_help_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = run(capfd, *arguments)
        assert (code, err) == (0, "")
        assert "convert" in out
    code, out, _ = run(capfd, "convert", "--help")
    assert code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)  # colours, which some CI services ask for
    for text in (
        "SOURCE",
        "OUT",
        "--keep-ratio",
        "--cluster-layer",
        "--overwrite",
        "--dry-run",
        "--no-verify",
        "--json",
    ):
        assert text in out
    assert run(capfd, "--version")[1].startswith("ailurus-hf ")


def test_spinner_only_for_people(
    source: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the steps are shown on stderr, and stdout stays a program's."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = run(capfd, "convert", "segmenter", source, "out", "--json")
    assert code == 0
    assert json.loads(out)["written"]
    assert "verifying" in err or "converting" in err
