"""`make gpu`'s script runs on the CPU, on tiny models, and goes on where it stopped."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import typer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_runs_and_resumes(tmp_path: Path) -> None:
    script, out = runpy.run_path(str(SCRIPT)), tmp_path / "rows.jsonl"
    script["main"](out, minutes=0.0, rounds=1, device="cpu", tiny=True)
    assert not out.exists()
    script["main"](out, minutes=5.0, rounds=1, device="cpu", tiny=True)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")
    script["main"](out, minutes=5.0, rounds=1, device="cpu", tiny=True)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["error"] for record in records] == [None] * len(lines)
    assert [record["case"] for record in records] == [json.loads(line)["case"] for line in lines]
    assert "grouping=density_peaks" in out.with_suffix(".md").read_text()


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.Exit):
        runpy.run_path(str(SCRIPT))["main"](tmp_path / "rows.jsonl", device="cuda")
    assert capsys.readouterr().err == "no CUDA device here: nothing measured\n"
