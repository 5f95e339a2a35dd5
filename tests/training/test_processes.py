"""Two processes measure what one does: one launch for all promises about them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ailurus_hf import AiluRusForSemanticSegmentation
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import tiny_model
from tests.training.on_processes import measured

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    """Of one process, and of each of two; of the three pictures the second process gets one less."""
    place = tmp_path_factory.mktemp("processes")
    data, model = write_camvid(place / "data", train=4, val=3), place / "model"
    settings = {"num_labels": NUM_LABELS, "semantic_loss_ignore_index": IGNORE}
    tiny_model(AiluRusForSemanticSegmentation, **settings).save_pretrained(model)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    arguments = ["-m", "tests.training.on_processes", data, model, place / "two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen([*launch, *map(str, arguments)], env=environment, cwd=ROOT) as launched:
        one = measured(data, model, str(place / "one"), batch_size=4)
        assert launched.wait(200) == 0
    return one, [json.loads((place / f"two.{process}").read_text()) for process in range(2)]


def test_every_budget_is_evaluated_as_by_one_process(measurements):
    """Each picture once, and every process has the result."""
    one, two = measurements
    for found in two:
        assert found["processes"] == 2
        assert found["evaluated"] == one["evaluated"]
    assert one["evaluated"]["pictures"] == 3


def test_trainer_evaluates_exactly_and_has_the_same_loss(measurements):
    one, two = measurements
    for found in two:
        assert found["trained"]["evaluation"] == one["trained"]["evaluation"]
        assert found["trained"]["loss"] == pytest.approx(one["trained"]["loss"], rel=1e-4)
