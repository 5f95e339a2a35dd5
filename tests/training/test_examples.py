"""The fine-tuning scripts as a user runs them: killed and resumed, on one process and on two."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, AiluRusModel
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import tiny_model

ROOT = Path(__file__).parents[2]
TRAINER, LOOP = ROOT / "examples" / "finetune_segmentation.py", ROOT / "examples" / "finetune_accelerate.py"
# Without --multi_gpu, accelerate 1.15 starts one process on a machine without GPUs, whatever the number asked for.
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set whose number of validation pictures is odd, and a checkpoint to start from."""
    place = tmp_path_factory.mktemp("place")
    write_camvid(place / "data", train=8, val=3)
    model = tiny_model(AiluRusForSemanticSegmentation, num_labels=NUM_LABELS, semantic_loss_ignore_index=IGNORE)
    model.save_pretrained(place / "model")
    AiluRusImageProcessor().save_pretrained(place / "model")
    return place


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process: what it imports is there already."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run_script(script, *arguments):
        AcceleratorState._reset_state(reset_partial_state=True)  # or it would be that of another test
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    yield run_script
    AcceleratorState._reset_state(reset_partial_state=True)


def options(place, run_folder, *more):
    common = ["--model", place / "model", "--data", place / "data", "--output_dir", run_folder, "--crop", 24, 32]
    return [str(part) for part in [*common, *more]]


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def kill_after(file, *arguments):
    """Start a process, and kill it without warning as soon as the file is there."""
    process = start(*arguments)
    while not file.is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def loop_log(run_folder):
    return json.loads((run_folder / "progress.json").read_text())["log"]


def trainer_losses(run_folder):
    history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_trainer_script_from_the_encoder_alone_to_the_card(place, tmp_path, run):
    """A checkpoint without a head gets a fresh one; a schedule, another budget in evaluation, layer-wise rates."""
    tiny_model(AiluRusModel, num_labels=2).save_pretrained(place / "encoder")
    AiluRusImageProcessor().save_pretrained(place / "encoder")
    settings = [
        "--model", place / "encoder", "--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, "--use_cpu",
        "--keep_ratio_schedule", "0:1,0.5:0.25", "--eval_keep_ratio", 1, 0.25, "--layer_decay", 0.8,
        "--class_weight_power", 0.5, "--gradient_accumulation_steps", 2, "--dataset_name", "Blocks", "--bf16",
    ]  # fmt: skip
    run(TRAINER, *options(place, tmp_path / "run", *settings))
    results = json.loads((tmp_path / "run" / "eval_0.25_results.json").read_text())
    assert results["eval_keep_ratio"] == 0.25
    assert "| 0.25 | " in (tmp_path / "run" / "README.md").read_text()
    model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert (model.config.num_labels, model.config.keep_ratio) == (NUM_LABELS, 0.25)
    assert model.config.id2label[2] == "class 2"


@pytest.mark.slow  # that Trainer goes on as it was is tested in test_trainer.py
def test_trainer_script_goes_on_after_a_kill(place, tmp_path, run):
    settings = ["--max_steps", 8, "--save_steps", 2, "--eval_steps", 2, "--logging_steps", 1, "--use_cpu"]
    run(TRAINER, *options(place, tmp_path / "straight", *settings))
    killed = options(place, tmp_path / "killed", *settings)
    kill_after(tmp_path / "killed" / "checkpoint-4" / "trainer_state.json", TRAINER, *killed)
    run(TRAINER, *killed)
    straight = trainer_losses(tmp_path / "straight" / "checkpoint-8")
    assert len(straight) == 8
    assert trainer_losses(tmp_path / "killed" / "checkpoint-8") == straight


@pytest.mark.slow
def test_loop_goes_on_after_a_kill(place, tmp_path, run):
    settings = ["--steps", 7, "--save_every", 3, "--batch_size", 2, "--accumulation", 2, "--layer_decay", 0.9]
    run(LOOP, *options(place, tmp_path / "straight", *settings))
    killed = options(place, tmp_path / "killed", *settings)
    kill_after(tmp_path / "killed" / "progress.json", LOOP, *killed)
    run(LOOP, *killed)
    assert len(loop_log(tmp_path / "straight")) == 7 + 3
    assert loop_log(tmp_path / "killed") == loop_log(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["best", "progress.json", "state-7"]
    best = max(entry["mean_iou"] for entry in loop_log(tmp_path / "straight") if "mean_iou" in entry)
    assert f"{best:.4f}" in (tmp_path / "straight" / "best" / "README.md").read_text()
    AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "straight" / "best")


@pytest.mark.slow  # that two processes count as one is tested in test_processes.py
def test_two_processes_train_and_evaluate_as_one(place, tmp_path, run):
    """Loss and gradient within rounding; evaluation counts the pixels of three pictures on two processes once."""
    settings = ["--steps", 4, "--save_every", 4, "--learning_rate", 1e-3]
    run(LOOP, *options(place, tmp_path / "one", *settings, "--batch_size", 4))
    process = start(*LAUNCH, LOOP, *options(place, tmp_path / "two", *settings, "--batch_size", 2))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "training on 2 processes, cpu" in output
    one, two = loop_log(tmp_path / "one"), loop_log(tmp_path / "two")
    for value in ("loss", "grad_norm"):
        assert [entry[value] for entry in two[:4]] == pytest.approx([entry[value] for entry in one[:4]], rel=1e-3), (
            value
        )
    assert two[-1]["pixels"] == one[-1]["pixels"]
    assert two[-1]["pixel_accuracy"] == pytest.approx(one[-1]["pixel_accuracy"], abs=5e-3)


@pytest.mark.parametrize("script", [TRAINER, LOOP], ids=["trainer", "loop"])
def test_scripts_explain_mistakes_in_a_line(place, tmp_path, run, script):
    with pytest.raises(SystemExit, match=r"^error: layout must be one of camvid, ade20k, cityscapes, got 'coco'$"):
        run(script, *options(place, tmp_path / "run", "--layout", "coco"))
