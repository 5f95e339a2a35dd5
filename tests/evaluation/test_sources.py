"""What `evaluate_segmentation` takes besides folders: data sets, streams and rows; and who launched it."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.data import HubSegmentation, LabelRule
from ailurus_hf.evaluation import evaluate_segmentation
from tests.factories import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)) for _ in range(3)],
        "annotation": [Image.fromarray(generator.integers(0, 5, (24, 32), dtype=np.uint8)) for _ in range(3)],
    }
    features = datasets.Features({name: datasets.Image() for name in rows})
    return datasets.Dataset.from_dict(rows, features=features)


def evaluate(samples):
    model = tiny_model(AiluRusForSemanticSegmentation)
    report = evaluate_segmentation(model, AiluRusImageProcessor(), samples, [1, 0.5], progress=False)
    return report.num_pictures, [result.confusion.counts.tolist() for result in report.budgets]


def test_data_sets_streams_and_rows_give_the_same(dataset):
    expected = evaluate(HubSegmentation(dataset, LabelRule(5)))
    stream = dataset.to_iterable_dataset()
    assert expected[0] == 3
    for samples in (dataset, stream, HubSegmentation(stream, LabelRule(5)), list(dataset), iter(dataset)):
        assert evaluate(samples) == expected


def test_what_a_stream_has_not_is_said(dataset):
    source = HubSegmentation(dataset.to_iterable_dataset())
    assert len(list(source)) == len(list(source)) == 3
    with pytest.raises(TypeError, match="a stream has no length"):
        len(source)
    with pytest.raises(TypeError, match="no rows by number"):
        source[0]
    with pytest.raises(ValueError, match="at least one picture"):
        evaluate(iter([]))
    with pytest.raises(TypeError, match="samples must be LabelledImage"):
        evaluate([1])
    with pytest.raises(ValueError, match="label_column must be one of"):
        evaluate([{"image": 1, "truth": 2}])


SCRIPT = """
import sys, torch
from PIL import Image
import numpy as np
{setup}
from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.data import LabelledImage
from ailurus_hf.evaluation import evaluate_segmentation
from tests.factories import tiny_model
sample = LabelledImage(Image.new("RGB", (32, 24)), np.zeros((24, 32), np.int64), "a")
report = evaluate_segmentation(
    tiny_model(AiluRusForSemanticSegmentation), AiluRusImageProcessor(), [sample] * 3, [1], progress=False)
assert report.num_pictures == 3, report.num_pictures
assert report.budgets[0].confusion.counts.sum() == 3 * 24 * 32
torch.distributed.destroy_process_group()  # else a thread of it may outlive the interpreter, which aborts
"""


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param("torch.distributed.init_process_group('gloo')", marks=pytest.mark.slow),
        pytest.param("from accelerate import PartialState; PartialState(cpu=True)", marks=pytest.mark.slow),
        "from accelerate import PartialState; PartialState()",
    ],
    ids=["torch", "told", "not told"],
)
def test_processes_share_whoever_told_them_of_each_other(setup, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(setup=setup))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
