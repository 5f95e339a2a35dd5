"""What merging gains on a GPU: rows in order of importance, each written as it is measured, until the time is up.

python benchmarks/gpu.py --minutes 9 --out gpu.jsonl

A run that is started anew skips the cases that are in the file, except those that failed. At the end a table in
Markdown goes beside it.
"""

import json
import sys
import time
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # where nothing is installed

from ailurus_hf.benchmark.cases import CASES
from ailurus_hf.benchmark.run import BenchmarkRow, benchmark, environment

# model, side, batch, dtype, mode, train
FIRST = [
    *((*case, batch, "bfloat16", mode, False)
      for case in (("vit_l", 640), ("vit_l", 1024), ("vit_s", 640)) for batch in (1, 8) for mode in ("eager", "graph")),
    ("vit_l", 640, 1, "bfloat16", "compiled", False),
    ("vit_l", 640, 8, "bfloat16", "eager", True),
]  # fmt: skip
ALL = [
    *((*case, batch, dtype, mode, False)
      for case in (*product(("vit_s", "vit_b", "vit_l"), (512, 640, 1024)), ("depth_anything_l", 518),
                   ("dinov3_b", 1024), ("sam_b", 1024), ("segformer_b5", 1024), ("lookupvit_b", 384))
      for batch, dtype, mode in product((1, 8, 32), ("bfloat16", "float32"), ("eager", "graph", "compiled"))),
]  # fmt: skip
TINY = [("tiny", 64, batch, "float32", "eager", train) for batch in (1, 2) for train in (False, True)]


def main(
    out: Annotated[Path, typer.Option(help="File of JSON lines, one per case.")] = Path("gpu.jsonl"),
    minutes: Annotated[float, typer.Option(help="Start no case after this; the last may end later.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="How often each variant is timed.")] = 10,
    device: str = "cuda",
    full: Annotated[bool, typer.Option("--full", help="The whole matrix.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny models, to see that it runs.")] = False,
) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        typer.echo("no CUDA device here: nothing measured", err=True)
        raise typer.Exit(2)
    where, end = environment(device), time.monotonic() + 60 * minutes
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = [record["case"] for record in records if record["environment"] == where and record["error"] is None]
    for case in TINY if tiny else [*FIRST, *ALL] if full else FIRST:
        if list(case) in done:
            continue
        if time.monotonic() > end:
            typer.echo("the time is up; start again to go on", err=True)
            break
        record: dict[str, Any] = {"case": list(case), "environment": where, "rows": [], "error": None}
        start = time.monotonic()
        try:
            record["rows"] = [asdict(row) for row in measure(case, device, rounds)]
        except Exception as error:  # the other cases are worth having
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        record["seconds"] = time.monotonic() - start  # warm-up, compiling and counting included
        records.append(record)
        done.append(list(case))
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        typer.echo(f"{case}: {record['error'] or format(record['seconds'], '.0f') + ' s'}")
    out.with_suffix(".json").write_text(json.dumps(records, indent=2) + "\n")
    out.with_suffix(".md").write_text(markdown(records))


def measure(case: tuple[str, int, int, str, Any, bool], device: str, rounds: int) -> list[BenchmarkRow]:
    name, side, batch, dtype, mode, train = case
    torch.manual_seed(0)
    size, entry = (side, side), CASES[name]
    model = entry.build(size)
    groupings = ("region_merging", "density_peaks")
    budgets = [{"keep_ratio": ratio, "grouping": grouping} for ratio, grouping in product((0.5, 0.25), groupings)]
    if name.startswith("lookupvit"):
        budgets = [{"compressed_size": each} for each in model.config.compressed_sizes]
    return benchmark(
        name, model, size, budgets, plain=entry.plain and entry.plain(size), batch_size=batch,
        dtype=getattr(torch, dtype), device=device, mode=mode, train=train, rounds=rounds, warmup=3,
    )  # fmt: skip


def markdown(records: list[dict[str, Any]]) -> str:
    names = [field.name for field in fields(BenchmarkRow)]
    lines = []
    for where in {json.dumps(record["environment"]): record["environment"] for record in records}.values():
        lines += [", ".join(f"{name} {value}" for name, value in where.items()), ""]
        lines += [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for record in records:
            if record["environment"] == where:
                lines += [f"| {' | '.join(_cell(row[name]) for name in names)} |" for row in record["rows"]]
        failed = [record for record in records if record["error"] and record["environment"] == where]
        lines += ["", *(f"- failed: {record['case']}: {record['error']}" for record in failed), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
