"""The fine-tuning scripts as a user runs them: killed and resumed, on one process and on two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, AiluRusModel
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import tiny_model

ROOT = Path(__file__).parents[2]
TRAINER, LOOP = ROOT / "examples" / "finetune_segmentation.py", ROOT / "examples" / "finetune_accelerate.py"
# Without --multi_gpu, accelerate 1.15 starts one process on a machine without GPUs, whatever the number asked for.
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set whose number of validation pictures is odd, and a checkpoint to start from."""
    place = tmp_path_factory.mktemp("place")
    write_camvid(place / "data", train=8, val=3)
    model = tiny_model(AiluRusForSemanticSegmentation, num_labels=NUM_LABELS, semantic_loss_ignore_index=IGNORE)
    model.save_pretrained(place / "model")
    AiluRusImageProcessor().save_pretrained(place / "model")
    return place


def command(script, place, run, *options, processes=1):
    start = [sys.executable] if processes == 1 else [*LAUNCH, "--num_processes", str(processes)]
    common = ["--model", place / "model", "--data", place / "data", "--output_dir", run, "--crop", 24, 32]
    return [str(part) for part in [*start, script, *common, *options]]


def start(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(arguments, expected=0):
    process = start(arguments)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == expected, output
    return output


def kill_after(arguments, file):
    """Kill the process without warning as soon as the file is there."""
    process = start(arguments)
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


def test_trainer_script_from_the_encoder_alone_to_the_card(place, tmp_path):
    """A checkpoint without a head gets a fresh one; a schedule, another budget in evaluation, layer-wise rates."""
    tiny_model(AiluRusModel, num_labels=2).save_pretrained(place / "encoder")
    AiluRusImageProcessor().save_pretrained(place / "encoder")
    options = [
        "--model", place / "encoder", "--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, "--use_cpu",
        "--keep_ratio_schedule", "0:1,0.5:0.25", "--eval_keep_ratio", 1, 0.25, "--layer_decay", 0.8,
        "--class_weight_power", 0.5, "--gradient_accumulation_steps", 2, "--dataset_name", "Blocks", "--bf16",
    ]  # fmt: skip
    run(command(TRAINER, place, tmp_path / "run", *options))
    results = json.loads((tmp_path / "run" / "eval_0.25_results.json").read_text())
    assert results["eval_keep_ratio"] == 0.25
    assert "| 0.25 | " in (tmp_path / "run" / "README.md").read_text()
    model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert (model.config.num_labels, model.config.keep_ratio) == (NUM_LABELS, 0.25)
    assert model.config.id2label[2] == "class 2"


def test_trainer_script_goes_on_after_a_kill(place, tmp_path):
    options = ["--max_steps", 8, "--save_steps", 2, "--eval_steps", 2, "--logging_steps", 1, "--use_cpu"]
    run(command(TRAINER, place, tmp_path / "straight", *options))
    kill_after(
        command(TRAINER, place, tmp_path / "killed", *options),
        tmp_path / "killed" / "checkpoint-4" / "trainer_state.json",
    )
    run(command(TRAINER, place, tmp_path / "killed", *options))
    straight = trainer_losses(tmp_path / "straight" / "checkpoint-8")
    assert len(straight) == 8
    assert trainer_losses(tmp_path / "killed" / "checkpoint-8") == straight


def test_loop_goes_on_after_a_kill(place, tmp_path):
    options = ["--steps", 7, "--save_every", 3, "--batch_size", 2, "--accumulation", 2, "--layer_decay", 0.9]
    run(command(LOOP, place, tmp_path / "straight", *options))
    kill_after(command(LOOP, place, tmp_path / "killed", *options), tmp_path / "killed" / "progress.json")
    run(command(LOOP, place, tmp_path / "killed", *options))
    assert len(loop_log(tmp_path / "straight")) == 7 + 3
    assert loop_log(tmp_path / "killed") == loop_log(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["best", "progress.json", "state-7"]
    best = max(entry["mean_iou"] for entry in loop_log(tmp_path / "straight") if "mean_iou" in entry)
    assert f"{best:.4f}" in (tmp_path / "straight" / "best" / "README.md").read_text()
    AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "straight" / "best")


def test_two_processes_train_and_evaluate_as_one(place, tmp_path):
    """Loss and gradient within rounding; evaluation counts the pixels of three pictures on two processes once."""
    options = ["--steps", 4, "--save_every", 4, "--learning_rate", 1e-3]
    run(command(LOOP, place, tmp_path / "one", *options, "--batch_size", 4))
    output = run(command(LOOP, place, tmp_path / "two", *options, "--batch_size", 2, processes=2))
    assert "training on 2 processes, cpu" in output
    one, two = loop_log(tmp_path / "one"), loop_log(tmp_path / "two")
    for value in ("loss", "grad_norm"):
        assert [entry[value] for entry in two[:4]] == pytest.approx([entry[value] for entry in one[:4]], rel=1e-3), (
            value
        )
    assert two[-1]["pixels"] == one[-1]["pixels"]
    assert two[-1]["pixel_accuracy"] == pytest.approx(one[-1]["pixel_accuracy"], abs=5e-3)


def test_trainer_on_two_processes_as_on_one(place, tmp_path):
    """Evaluation exactly, of an untrained model; the loss of a step within rounding."""
    options = ["--max_steps", 1, "--logging_steps", 1, "--eval_strategy", "no", "--save_strategy", "no", "--use_cpu"]
    options += ["--load_best_model_at_end", "False", "--optim", "sgd", "--learning_rate", 0]
    run(command(TRAINER, place, tmp_path / "one", *options, "--per_device_train_batch_size", 4))
    options += ["--per_device_train_batch_size", 2, "--ddp_backend", "gloo"]
    run(command(TRAINER, place, tmp_path / "two", *options, processes=2))
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    for ratio in ("1", "0.5", "0.25"):
        one, two = (json.loads((tmp_path / name / f"eval_{ratio}_results.json").read_text()) for name in ("one", "two"))
        for metric in ("eval_mean_iou", "eval_pixel_accuracy", "eval_keep_ratio"):
            assert two[metric] == one[metric]


def test_scripts_explain_mistakes_in_a_line(place, tmp_path):
    output = run(command(TRAINER, place, tmp_path / "run", "--layout", "coco"), expected=1)
    assert "error: layout must be one of camvid, ade20k, cityscapes, got 'coco'" in output
    assert "Traceback" not in output
