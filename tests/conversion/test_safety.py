"""Unsafe and broken checkpoints through the command line: one line, exit code 2, no code run, nothing left behind.

The files are made by `safety_files`; the recorded ones of the shared data are a second line.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ailurus_hf import AiluRusForSemanticSegmentation
from ailurus_hf.cli.app import main
from ailurus_hf.conversion.recipes import RECIPES
from tests.conversion.safety_files import (
    BROKEN,
    CONVERTS,
    MALICIOUS,
    VARIANT,
    write_broken_safetensors,
    write_unsafe,
)
from tests.conversion.segmenter_files import REFERENCE, segmenter_tensors, write_segmenter
from tests.paths import ROOT, golden

REFUSED = {name: said for name, (_, said) in (MALICIOUS | BROKEN).items()}
# recorded folder, what the line must say
RECORDED = [
    ("malicious_bare_pickle", "checkpoint.pth is refused"),
    ("malicious_builtins_open", "'io.open', which may run code"),
    ("malicious_exec_legacy_pickle", "'exec', which may run code"),
    ("malicious_in_model_dict", "system', which may run code"),
    ("malicious_mmseg_config", "no entry 'model' with the weights; it holds 'meta', 'state_dict'"),
    ("malicious_os_system", "system', which may run code"),
    ("malicious_pickle_named_safetensors", "it is not tried as a pickle"),
    ("malicious_yaml", "python/object/apply:os.system"),
    ("missing_key", "missing key in the checkpoint: encoder.blocks.1.attn.qkv.bias"),
    ("no_model_entry", "no entry 'model' with the weights; it holds 'state', 'epoch'"),
    ("not_a_dict", "holds a list"),
    ("truncated_pth", "damaged or cut short"),
    ("truncated_safetensors", "no checkpoint.pth in"),
    ("unexpected_key", "unexpected key in the checkpoint: encoder.blocks.2.norm1.weight"),
    ("wrong_pos_embed_length", "wrong shape of encoder.pos_embed"),
    ("wrong_shape_classes", "wrong shape of decoder.head.weight"),
    ("wrong_shape_transposed", "wrong shape of encoder.blocks.0.mlp.fc1.weight"),
]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, in which no attack may leave its mark; sources lie beside it."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path / "scratch")
    yield tmp_path / "scratch"
    assert not list(tmp_path.rglob("PWNED"))


def assert_refused(
    recipe: str, source: Path, said: str, scratch: Path, capfd: pytest.CaptureFixture[str], *options: str
) -> None:
    assert main(["convert", recipe, str(source), "out", *options]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ailurus-hf: error: ")
    assert said in line
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_folder_is_refused(name: str, tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_unsafe(tmp_path / "source", name)
    assert_refused("segmenter", source, REFUSED[name], scratch, capfd)


def test_the_attacks_work_on_careless_readers(scratch: Path) -> None:
    """Else the tests above would test nothing."""
    write_unsafe(scratch.parent / "source", "os.mkdir beside the weights")
    torch.load(scratch.parent / "source" / "checkpoint.pth", weights_only=False)
    (scratch / "PWNED").rmdir()


def test_broken_safetensors_are_refused(tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, file in write_broken_safetensors(tmp_path / "source").items():
        assert_refused("segmenter", file, f"{name}.safetensors is damaged", scratch, capfd)


@pytest.mark.parametrize("recipe", [*(name for name in RECIPES if name != "segmenter"), "auto"])
def test_no_recipe_runs_what_a_file_holds(
    recipe: str, tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also not those that read tensors beside other objects."""
    for index, name in enumerate(MALICIOUS):
        source = write_unsafe(tmp_path / f"source{index}", name)
        if recipe == "auto" and name == "Python config":  # recognised by its tensors, and refused for its layout
            assert_refused(recipe, source, "no entry 'model'", scratch, capfd)
            continue
        assert_refused(recipe, source, "", scratch, capfd, "--set", "num_attention_heads=1")


@pytest.mark.parametrize("name", CONVERTS)
def test_valid_checkpoint_converts(name: str, tmp_path: Path, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = segmenter_tensors(VARIANT)
    write_segmenter(tmp_path / "source", VARIANT, CONVERTS[name](tensors))
    assert main(["convert", "segmenter", str(tmp_path / "source"), "out"]) == 0
    printed = capfd.readouterr()
    assert "written   out:" in printed.out
    assert [path.name for path in scratch.iterdir()] == ["out"]
    model = AiluRusForSemanticSegmentation.from_pretrained("out", dtype=torch.float32, keep_ratio=1.0).eval()
    if name == "NaN":
        (line,) = printed.err.splitlines()
        assert line.startswith("ailurus-hf: warning: NaN or infinite weights in encoder.norm.weight")
        return
    assert printed.err == ""
    assert "verified" in printed.out
    pixel_values = torch.randn(1, 3, 24, 32)
    expected = REFERENCE(tensors, pixel_values)
    with torch.no_grad():
        difference = (model(pixel_values).logits - expected).abs().max()
    if name == "half precision":  # the weights are rounded, and not more than that
        assert 1e-4 < difference < 0.05
    else:
        assert difference <= 3e-5


def test_in_a_fresh_process(tmp_path: Path, scratch: Path) -> None:
    """What a test process might hide: imports, warnings and progress bars on stderr."""
    write_unsafe(tmp_path / "bad", "os.mkdir beside the weights")
    write_segmenter(tmp_path / "good", VARIANT)
    program = "from ailurus_hf.cli.app import main; print([main(['convert', 'segmenter', f'../{n}', n]) for n in {}])"
    done = subprocess.run(
        [sys.executable, "-c", program.replace("{}", "('bad', 'good')")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=240,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[2, 0]"
    (line,) = done.stderr.splitlines()
    assert "mkdir', which may run code" in line
    assert [path.name for path in scratch.iterdir()] == ["good"]


class TestRecorded:
    @pytest.mark.parametrize(("name", "said"), RECORDED)
    def test_folder_is_refused(self, name: str, said: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert_refused("segmenter", golden("safety", name), said, scratch, capfd)
        if name.startswith("malicious"):
            for recipe in [*RECIPES, "auto"]:
                assert_refused(recipe, golden("safety", name), "", scratch, capfd, "--set", "num_attention_heads=1")

    def test_broken_safetensors_are_refused(self, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
        files = sorted(golden("safety", "truncated_safetensors").glob("*.safetensors"))
        assert len(files) == 5
        for file in files:
            assert_refused("segmenter", file, f"{file.name} is damaged", scratch, capfd)

    @pytest.mark.parametrize("name", ["ddp_prefix", "half_precision_weights", "nan_weight", "valid_control"])
    def test_valid_checkpoint_converts(self, name: str) -> None:
        assert main(["convert", "segmenter", str(golden("safety", name)), "out"]) == 0
