"""`ailurus-hf benchmark`, on a tiny model: its times mean nothing."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTModel

from ailurus_hf import AiluRusForSemanticSegmentation, LookupViTModel, apply_ailurus
from ailurus_hf.benchmark import count_flops
from ailurus_hf.benchmark.cases import CASES, TINY
from ailurus_hf.benchmark.run import benchmark
from ailurus_hf.cli.app import main
from tests.factories import tiny_config, tiny_lookupvit_config, tiny_model

ARGUMENTS = ["benchmark", "--device", "cpu", "--rounds", "2"]


def test_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained(tmp_path / "model")
    table = tmp_path / "rows.csv"
    options = ["--model", "tiny", "--model", str(tmp_path / "model"), "--size", "48x64", "--csv", str(table)]
    assert main([*ARGUMENTS, *options, "--keep-ratio", "0.5", "--grouping", "density_peaks"]) == 0
    out, _ = capfd.readouterr()
    for heading in ("threads 1", "torch", "speed-up", "of ideal", "launches", "48 x 64"):
        assert heading in out
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == 2 * ["plain", "keep_ratio=0.5 grouping=density_peaks"]


def test_json_of_several_plain_variants(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "tiny", "--attention", "sdpa", "--attention", "eager", "--keep-ratio", "0.25", "--json"]
    assert main([*ARGUMENTS, *options]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["variant"] for row in rows[:2]] == ["plain, sdpa", "plain, eager"]
    fastest = min(rows[:2], key=lambda row: row["ms"])
    assert [row["speed_up"] is None for row in rows] == [row is fastest for row in rows]


def test_wrong_model_and_size(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--model", "vit_xxl"]) == 2
    assert "vit_s" in capfd.readouterr().err
    assert main([*ARGUMENTS, "--model", "tiny", "--compressed-size", "3"]) == 2
    assert "LookupViT" in capfd.readouterr().err


def test_flops_and_launches() -> None:
    model = CASES["tiny"].build((64, 64))
    plain, merged = benchmark("tiny", model, (64, 64), [{"keep_ratio": 0.25}], rounds=1)
    model.config.keep_ratio = 1.0
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 64, 64))
    assert plain.gflops == pytest.approx(counter.get_total_flops() / 1e9)
    assert merged.gflops is not None
    assert plain.gflops is not None
    assert merged.gflops < plain.gflops
    assert plain.launches is not None
    assert merged.launches is not None
    assert merged.launches > plain.launches
    assert plain.grouping_share is None
    assert merged.grouping_share is not None
    assert merged.grouping_share > 0
    assert plain.peak_mib is None


@pytest.mark.parametrize("train", [False, True])
def test_adapted(train: bool) -> None:
    model = apply_ailurus(ViTModel(ViTConfig(**TINY, intermediate_size=64, image_size=64, patch_size=8)))
    plain, merged = benchmark("vit", model, (64, 64), [{"keep_ratio": 0.25}], rounds=1, train=train)
    assert merged.gflops is not None
    assert plain.gflops is not None
    assert merged.gflops < plain.gflops
    assert (merged.grouping_share is None) == train


def test_lookupvit_beside_a_vit() -> None:
    model, vit = LookupViTModel(tiny_lookupvit_config()), CASES["tiny"].build((48, 48))
    rows = benchmark("l", model, (48, 48), [{"compressed_size": 2}, {"compressed_size": 5}], plain=vit, rounds=1)
    assert [row.variant for row in rows] == ["plain", "compressed_size=2", "compressed_size=5"]
    assert vit.config.keep_ratio < 1  # as it was built, and still it is the dense one
    assert rows[0].gflops == pytest.approx(count_flops(vit, 48, 48, keep_ratio=1) / 1e9)
    assert rows[0].launches == benchmark("v", vit, (48, 48), [], rounds=1)[0].launches


def test_lookupvit_alone() -> None:
    """In the place of a plain model stands the largest size of the training, 3 x 3."""
    model = LookupViTModel(tiny_lookupvit_config(compressed_sizes=[2, 3]))
    plain, same, less = benchmark("l", model, (48, 48), [{"compressed_size": 3}, {"compressed_size": 2}], rounds=1)
    assert plain.gflops == same.gflops > less.gflops


def test_a_graph_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        benchmark("tiny", AiluRusForSemanticSegmentation(tiny_config()), (48, 48), [], mode="graph")
