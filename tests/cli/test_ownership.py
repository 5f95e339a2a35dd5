"""What the commands did not write they never replace; what they wrote is no input of theirs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, save_with_code
from ailurus_hf.cli.app import main
from ailurus_hf.conversion import convert_checkpoint
from tests.factories import tiny_model

PIXELS = np.random.default_rng(0).integers(0, 256, (44, 70, 3), dtype=np.uint8)
MODEL = ("--model", "model")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A scratch folder with a model and a folder of pictures and label maps."""
    monkeypatch.chdir(tmp_path)
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained("model")
    AiluRusImageProcessor().save_pretrained("model")
    for folder, mode in (("pictures", "RGB"), ("labels", "L")):
        Path(folder).mkdir()
        for name in "ab":
            picture = Image.fromarray(PIXELS) if mode == "RGB" else Image.new(mode, (70, 44))
            picture.save(f"{folder}/{name}.png")


def run(capfd, *arguments):
    code = main(list(arguments))
    printed = capfd.readouterr()
    return code, printed.out, printed.err


def contents():
    return {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}


def refused(capfd, *arguments):
    """Check that nothing changes, and that one line says why; return it."""
    before = contents()
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert contents() == before
    return line


def test_predictions_among_the_pictures(capfd):
    arguments = ("predict", "pictures", *MODEL, "--out", "pictures", "--json")
    first = run(capfd, *arguments)
    before = contents()
    assert len(before) == 3 + 4 + 6  # model, pictures and labels, results
    assert run(capfd, *arguments) == first
    assert len(json.loads(first[1])) == 2
    assert contents() == before
    assert run(capfd, "predict", *map(str, sorted(Path("pictures").glob("*.png"))), *MODEL)[0] == 0
    assert len(list(Path("predictions").glob("*.json"))) == 2
    assert run(capfd, "evaluate", *MODEL, "--images", "pictures", "--labels", "labels", "--json")[0] == 0


@pytest.mark.parametrize("name", ["a.json", "b.labels.png", "a.overlay.png"])
def test_what_predict_did_not_write_stays(capfd, name):
    Path("predictions").mkdir()
    Path("predictions", name).write_text('{"annotation": "of somebody"}')
    for options in ((), ("--resume",)):
        line = refused(capfd, "predict", "pictures", *MODEL, *options)
        assert f"predictions/{name} is not replaced: this program did not write it" in line


def test_a_result_that_somebody_changed_is_theirs(capfd):
    assert run(capfd, "predict", "pictures", *MODEL)[0] == 0
    with Image.open("predictions/a.labels.png") as labels:
        labels.load()
    labels.info.clear()
    labels.save("predictions/a.labels.png")
    assert "a.labels.png is not replaced" in refused(capfd, "predict", "pictures", *MODEL)


def test_figures_and_tables_replace_their_like_only(capfd):
    evaluate = ("evaluate", *MODEL, "--images", "pictures", "--labels", "labels", "--keep-ratio", "1", "--csv")
    for _ in range(2):
        for out in ("f.png", "f.svg", "f.pdf"):
            assert run(capfd, "visualize", "pictures/a.png", *MODEL, "--out", out)[0] == 0
        assert run(capfd, *evaluate, "t.csv")[0] == 0
    for file in ("f.png", "pictures/b.png", "model/config.json"):
        assert f"{file} is not replaced" in refused(capfd, *evaluate, file)
    for command in (("visualize", "pictures/a.png", *MODEL), evaluate[:-1]):
        option = "--csv" if command[0] == "evaluate" else "--out"
        assert "pictures/a.png is not replaced" in refused(capfd, *command, option, "pictures/a.png")


@pytest.mark.parametrize("foreign", [".git", "checkpoint-5", "optimizer.pt", "model-1.safetensors", "notes.py"])
def test_overwrite_refuses_by_name_what_it_did_not_write(capfd, foreign):
    convert = ("convert", "ailurus", "model", "out", "--overwrite")
    assert run(capfd, *convert)[0] == 0
    assert run(capfd, *convert)[0] == 0
    path = Path("out", foreign)
    path.mkdir() if "." not in foreign[1:] else path.write_text("x")
    assert f"did not write {foreign} in it" in refused(capfd, *convert)
    with pytest.raises(FileExistsError, match=rf"overwrite=True: this program did not write {foreign} in it"):
        save_with_code(tiny_model(AiluRusForSemanticSegmentation), "out", overwrite=True)
    assert path.exists()


def test_checkpoints_of_other_projects_are_not_replaced(capfd):
    Path("vit").mkdir()
    Path("vit/config.json").write_text('{"model_type": "vit"}')
    Path("vit/model.safetensors").touch()
    assert "did not write config.json" in refused(capfd, "convert", "ailurus", "model", "vit", "--overwrite")
    with pytest.raises(FileExistsError, match="did not write config"):
        convert_checkpoint("ailurus", "model", "vit", overwrite=True)


def test_own_checkpoints_with_code_are_replaced():
    for _ in range(2):
        save_with_code(tiny_model(AiluRusForSemanticSegmentation), "out", overwrite=True, max_shard_size="50KB")
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        save_with_code(tiny_model(AiluRusForSemanticSegmentation), "out")


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "pictures", *MODEL, "--out", ""),
        ("visualize", "pictures/a.png", *MODEL, "--out", ""),
        ("convert", "ailurus", "model", ""),
        ("demo", "--out", ""),
        ("evaluate", *MODEL, "--images", "pictures", "--labels", "labels", "--csv", " "),
    ],
    ids=lambda arguments: arguments[0],
)
def test_outputs_need_a_name(capfd, arguments):
    assert "an output must have a name" in refused(capfd, *arguments)


def test_outputs_are_checked_before_the_work(capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for command in (
        ("predict", "pictures", "--model", "nowhere"),
        ("visualize", "pictures/a.png", "--model", "nowhere"),
        ("evaluate", "--model", "nowhere", "--images", "pictures", "--labels", "labels", "--csv", "t.csv"),
        ("convert", "ailurus", "nowhere", "out"),
        ("demo",),
    ):
        assert "is read-only" in refused(capfd, *command)
