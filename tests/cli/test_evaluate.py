"""`ailurus-hf evaluate`."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.cli.app import main
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import tiny_model


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_camvid(Path("data"))
    model = tiny_model(AiluRusForSemanticSegmentation, num_labels=NUM_LABELS, semantic_loss_ignore_index=IGNORE)
    model.save_pretrained("model")
    AiluRusImageProcessor().save_pretrained("model")
    return ["evaluate", "--model", "model", "--images", "data/val/images", "--labels", "data/val/labels"]


def test_one_table(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--keep-ratio", "0.25", "--boundary", "--per-class", "--csv", "table.csv", "--device", "cpu"]
    assert main([*arguments, *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "3 pictures, cpu, float32, 1 threads" in out
    for heading in ("keep_ratio", "mIoU", "boundary F", "agreement", "GFLOPs", "speed-up"):
        assert heading in out
    assert "LABEL_3" in out
    with open("table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["keep_ratio"] for row in rows] == ["1.0", "0.25"]
    assert f"{float(rows[1]['mean_iou']):.4f}" in out


def test_json_and_several_budgets(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--keep-ratio", "1", "--keep-ratio", "0.5", "--limit", "2", "--flip", "--scale", "1", "--scale", "0.5"]
    assert main([*arguments, *options, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["pictures"] == 2
    assert [budget["keep_ratio"] for budget in report["budgets"]] == [1, 0.5]
    assert 0 <= report["budgets"][1]["iou"]["LABEL_0"] <= 1


def test_methods_at_equal_cost(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--flop-ratio", "1.3", "--grouping", "region_merging", "--grouping", "grid", "--intervals"]
    assert main([*arguments, *options, "--json"]) == 0
    dense, *merged = json.loads(capfd.readouterr().out)["budgets"]
    assert [row["grouping"] for row in merged] == ["region_merging", "grid"]
    assert merged[0]["keep_ratio"] != merged[1]["keep_ratio"]
    for row in merged:
        assert 1.3 <= dense["gflops"] / row["gflops"] < 1.4
        assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]
    assert main([*arguments, *options, "--per-class"]) == 0
    assert "mIoU - dense (95 %)" in " ".join(capfd.readouterr().out.split())
    assert main([*arguments, "--grouping", "grid", "--limit", "1", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["budgets"]
    assert [(row["keep_ratio"], row["grouping"]) for row in rows] == [(1, None), (0.5, "grid"), (0.25, "grid")]


def test_mistakes_are_one_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    def complaint(*options: str) -> str:
        assert main([*arguments, *options]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        return err

    assert "'keep_ratio': ValueError: must be above 0 and at most 1, got 2" in complaint("--keep-ratio", "2")
    assert "labels outside the classes: 9" in complaint("--ignore-index", "200")
    assert "flop_ratio=50 is beyond reach" in complaint("--flop-ratio", "50")
    assert "flop_ratio must be above 1, got 0.5" in complaint("--flop-ratio", "0.5")
    assert "leave out --sliding-window" in complaint("--flop-ratio", "2", "--sliding-window")
    assert "must be one of 'density_peaks', 'region_merging', 'grid'" in complaint("--grouping", "best")
    assert "holds no pictures" in complaint("--images", "data/val")
    assert "3 of 3 label files are missing" in complaint("--labels", "elsewhere")
    Path("data/val/images/001.png").write_bytes(b"no picture")
    assert "001.png is not a picture" in complaint()
    assert main([*arguments, "--skip-unreadable"]) == 0
    out, err = capfd.readouterr()
    assert "2 pictures" in out
    assert "warning: skipped: data/val/images/001.png" in err
    Image.new("L", (3, 3)).save("data/val/labels/000.png")
    assert "000.png is 3 x 3 pixels, but its picture" in complaint("--skip-unreadable")
