"""Unsafe and broken checkpoints through the command line: one line, exit code 2, no code run, nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ailurus_hf import AiluRusForSemanticSegmentation
from ailurus_hf.cli.app import main
from tests.paths import ROOT, golden

# folder, what the line must say
REFUSED = [
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
CONVERTS = ["ddp_prefix", "half_precision_weights", "nan_weight", "valid_control"]
BROKEN_SAFETENSORS = [
    "empty.safetensors",
    "huge_header_length.safetensors",
    "offsets_out_of_range.safetensors",
    "truncated_data.safetensors",
    "truncated_header.safetensors",
]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("PWNED"))


def test_every_case_is_tested() -> None:
    names = {path.name for path in golden("safety").iterdir() if path.is_dir()}
    assert names == {name for name, _ in REFUSED} | set(CONVERTS)
    assert len(names) == 21


def assert_refused(source: Path, said: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "segmenter", str(source), "out"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ailurus-hf: error: ")
    assert said in line
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), REFUSED)
def test_folder_is_refused(name: str, said: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(golden("safety", name), said, scratch, capfd)


@pytest.mark.parametrize("name", [name for name, _ in REFUSED if name not in ("truncated_safetensors",)])
def test_file_is_refused(name: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = "model.safetensors" if name == "malicious_pickle_named_safetensors" else "checkpoint.pth"
    assert_refused(golden("safety", name, file), "", scratch, capfd)


@pytest.mark.parametrize("file", BROKEN_SAFETENSORS)
def test_broken_safetensors_are_refused(file: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(golden("safety", "truncated_safetensors", file), f"{file} is damaged", scratch, capfd)


@pytest.mark.parametrize("recipe", ["transformers", "timm", "dino", "dinov2", "mae", "mmseg", "ailurus", "auto"])
@pytest.mark.parametrize("name", [name for name, _ in REFUSED if name.startswith("malicious")])
def test_no_recipe_runs_what_a_file_holds(
    name: str, recipe: str, scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also not those that read tensors beside other objects."""
    assert main(["convert", recipe, str(golden("safety", name)), "out", "--set", "num_attention_heads=1"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("name", CONVERTS)
def test_valid_checkpoint_converts(name: str, scratch: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "segmenter", str(golden("safety", name)), "out"]) == 0
    printed = capfd.readouterr()
    assert "written   out:" in printed.out
    if name == "nan_weight":
        (line,) = printed.err.splitlines()
        assert line.startswith("ailurus-hf: warning: NaN or infinite weights in encoder.norm.weight")
    else:
        assert printed.err == ""
        assert "verified" in printed.out
    assert [path.name for path in scratch.iterdir()] == ["out"]
    AiluRusForSemanticSegmentation.from_pretrained(scratch / "out")


def test_prefix_makes_no_difference(scratch: Path) -> None:
    for name in ("ddp_prefix", "valid_control"):
        assert main(["convert", "segmenter", str(golden("safety", name)), name]) == 0
    weights = [(scratch / name / "model.safetensors").read_bytes() for name in ("ddp_prefix", "valid_control")]
    assert weights[0] == weights[1]


def test_half_precision_is_close_to_the_original(scratch: Path) -> None:
    """The rounded weights are those of valid_control, so its recorded logits hold to float16's precision."""
    assert main(["convert", "segmenter", str(golden("safety", "half_precision_weights")), "out"]) == 0
    expected = load_file(golden("safety", "valid_control", "golden.safetensors"))
    model = AiluRusForSemanticSegmentation.from_pretrained(scratch / "out", dtype=torch.float32, keep_ratio=1.0).eval()
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    assert 0 < (logits - expected["logits"]).abs().max() < 0.02


@pytest.mark.parametrize("name", ["malicious_os_system", "malicious_yaml", "valid_control"])
def test_in_a_fresh_process(name: str, scratch: Path) -> None:
    """What a test process might hide: imports, warnings and progress bars on stderr."""
    command = [sys.executable, "-m", "ailurus_hf.cli", "convert", "segmenter", str(golden("safety", name)), "out"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=scratch,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=240,
        check=False,
    )
    if name == "valid_control":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert list(scratch.iterdir()) == []
