"""`examples/train_lookupvit.py`: a few steps on tiny models."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from typer import BadParameter

from ailurus_hf import LookupViTForSemanticSegmentation
from tests.benchmark.test_examples import load
from tests.data.files import write_camvid

TINY = {
    "size": (32, 48), "hidden_size": 32, "layers": 2, "heads": 2, "patch_size": 8, "steps": 3, "batch_size": 2,
    "learning_rate": 1e-3, "compressed_size": [2, 4], "eval_size": [1, 4], "distill_weight": 0.5, "feature_weight": 0.0,
    "from_vit": None, "distill": None, "scenes": (6, 4), "seed": 0, "task": "segmentation",
    "initializer_range": 0.06, "out": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_dense_then_from_its_weights_with_its_help(tmp_path):
    script, data = load("train_lookupvit"), str(write_camvid(tmp_path / "data"))
    dense, ours = tmp_path / "vit", tmp_path / "lookupvit"
    script.main(**{**TINY, "data": data, "model": "vit", "out": dense})
    taught = {"from_vit": str(dense), "distill": str(dense), "feature_weight": 1.0}
    script.main(**{**TINY, **taught, "data": data, "model": "lookupvit", "out": ours})
    assert [row["keep_ratio"] for row in scores(dense)] == [1]
    small, large = scores(ours)
    assert (small["compressed_size"], large["compressed_size"]) == (1, 4)
    assert small["gflops"] < large["gflops"]
    assert all(0 <= row["mean_iou"] <= 1 for row in (small, large))
    config = LookupViTForSemanticSegmentation.from_pretrained(ours).config
    assert (config.compressed_sizes, config.semantic_loss_ignore_index, config.num_hidden_layers) == ([2, 4], 9, 2)


@pytest.mark.parametrize("model", ["vit", "lookupvit"])
def test_classification_of_drawn_scenes(model, tmp_path, monkeypatch):
    script = load("train_lookupvit")
    monkeypatch.setattr(script, "ProcessPoolExecutor", ThreadPoolExecutor)  # processes cost more than these few scenes
    script.main(**{**TINY, "data": "scenes", "task": "classification", "model": model, "out": tmp_path})
    assert all(0 <= row["pixel_accuracy"] <= 1 for row in scores(tmp_path))


def test_what_classification_asks():
    script = load("train_lookupvit")
    collate = script.Collator("classification", dict(enumerate(script.CLASS_NAMES)), 255)
    sky, building, road, person = map(script.CLASS_NAMES.index, ("sky", "building", "road", "person"))
    maps = torch.full((3, 10, 10), person)  # of which there is most, and which is not asked about
    for labels, order in zip(maps, ((sky, road, building), (road, building, sky), (building, sky, road)), strict=True):
        for count, label in enumerate(order):
            labels[: 3 - count, : 3 - count] = label  # 5, 3 and 1 pixels
    samples = [{"pixel_values": torch.zeros(3, 10, 10), "labels": labels} for labels in maps]
    answers = [script.ANSWERS[int(label)] for label in collate(samples)["labels"]]
    assert answers == ["sky", "road", "building"]


def test_distillation_loss_against_loops():
    torch.manual_seed(0)
    outputs = [
        SimpleNamespace(loss=torch.tensor(2.0), logits=torch.randn(2, 3, 2, 2), hidden_states=(torch.randn(2, n, 8),))
        for n in (4, 5)  # the teacher has a class token
    ]
    model, teacher = (lambda *args, output=output, **kwargs: output for output in outputs)
    trainer = SimpleNamespace(teacher=teacher, weight=0.25, feature_weight=3.0)
    loss = load("train_lookupvit").DistillationTrainer.compute_loss(trainer, model, {"pixel_values": None})
    student, taught = (output.logits.permute(0, 2, 3, 1).reshape(-1, 3).softmax(1).tolist() for output in outputs)
    pixels = [
        sum(t * math.log(t / s) for s, t in zip(ours, theirs, strict=True))
        for ours, theirs in zip(student, taught, strict=True)
    ]
    tokens = [output.hidden_states[0][:, -4:].reshape(-1, 8) for output in outputs]
    tokens = [(one - one.mean(1, keepdim=True)) / one.std(1, correction=0, keepdim=True) for one in tokens]
    distance = (tokens[0] - tokens[1]).square().mean()
    torch.testing.assert_close(loss, 0.75 * 2 + 0.25 * sum(pixels) / 8 + 3 * distance, atol=1e-4, rtol=1e-4)


def test_refusals(tmp_path):
    script, data = load("train_lookupvit"), str(write_camvid(tmp_path, train=1, val=1))
    with pytest.raises(BadParameter, match="classification needs the classes sky, building, road"):
        script.main(**{**TINY, "data": data, "model": "vit", "task": "classification"})
    with pytest.raises(BadParameter, match="--from-vit starts a LookupViT"):
        script.main(**{**TINY, "data": data, "model": "vit", "from_vit": "vit"})
