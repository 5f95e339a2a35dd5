"""Whose fault an error is: the user's is one line and exit code 2, a bug keeps its traceback."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation
from ailurus_hf.cli import info as info_module
from ailurus_hf.cli.app import main
from tests.factories import tiny_model


def bug_of_a_library():
    np.zeros(3).reshape(2, 2)


def bug_of_the_interpreter():
    int("x")
    raise AssertionError


def bug_in_a_call():
    len(5)


@pytest.mark.parametrize("bug", [bug_of_a_library, bug_of_the_interpreter, bug_in_a_call])
def test_bugs_are_not_the_users(bug, monkeypatch):
    bug.__globals__["__name__"] = "ailurus_hf.somewhere"
    try:
        monkeypatch.setattr("ailurus_hf.cli.loading.load_model", lambda *arguments, **settings: bug())
        with pytest.raises((ValueError, TypeError)):
            main(["info", "model"])
    finally:
        bug.__globals__["__name__"] = __name__


def test_a_bug_exits_with_1(tmp_path):
    code = "import sys, ailurus_hf.cli.loading as l; l.load_model = lambda *a, **k: int('x'); "
    code += "from ailurus_hf.cli import main; sys.exit(main(['info', 'model']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("words", [["--debug", "info", "/nope"], ["info", "/nope", "--debug"]])
def test_debug_shows_where_expected_errors_come_from(words, capfd):
    assert main(words) == 2
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "ailurus-hf: error: /nope does not exist; expected a checkpoint folder"


def test_memory_that_is_not_there(monkeypatch, capfd):
    for error in (MemoryError("so large"), torch.OutOfMemoryError("CUDA out of memory")):

        def fail(*arguments, error=error, **settings):
            raise error

        monkeypatch.setattr("ailurus_hf.cli.loading.load_model", fail)
        assert main(["info", "model"]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1


def test_messages_speak_of_options(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained("model")
    for folder, image in (("pictures", Image.new("RGB", (70, 44))), ("labels", Image.new("L", (70, 44), 77))):
        Path(folder).mkdir()
        image.save(f"{folder}/a.png")
    capfd.readouterr()
    arguments = ["evaluate", "--model", "model", "--images", "pictures", "--labels", "labels"]
    for options, said in (([], "--ignore-index 255. Give --ignore-index, or --reduce-labels"),
                          (["--ignore-index", "2"], "--ignore-index must not be one of the 5 classes"),
                          (["--sliding-window", "--ignore-index", "77"], "--sliding-window needs")):  # fmt: skip
        assert main([*arguments, *options]) == 2
        err = capfd.readouterr().err
        assert said in err
        assert "ignore_index" not in err
    assert main(["predict", "pictures", "--model", "nope"]) == 2
    assert "no folder nope" in capfd.readouterr().err
    assert info_module.MAX_SIDE > 1
