"""`ailurus-hf benchmark`: time, operations and memory of a model, plain and at several budgets, in turn."""

import csv
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from .options import Device, Json, find_device, parse_size

if TYPE_CHECKING:
    from ..benchmark.run import BenchmarkRow


def benchmark(
    model: Annotated[
        list[str], typer.Option(help="vit_s, vit_b, vit_l and others with random weights, or a checkpoint folder.")
    ] = ["vit_s"],  # noqa: B006
    size: Annotated[
        list[Any] | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Image, such as 640 or 480x640.", show_default="the model's"
        ),
    ] = None,
    keep_ratio: Annotated[list[float], typer.Option(help="Share of tokens to keep.")] = [0.5, 0.25],  # noqa: B006
    compressed_size: Annotated[
        list[Any] | None, typer.Option(parser=parse_size, metavar="SIZE", help="Of LookupViT, such as 5 or 5x7.")
    ] = None,
    grouping: Annotated[
        list[str] | None,
        typer.Option(help="region_merging, density_peaks or grid.", show_default="the model's"),
    ] = None,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Images per forward.")] = [1],  # noqa: B006
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Weights and images.")] = "float32",
    attention: Annotated[
        list[str] | None,
        typer.Option(help="sdpa, eager, flex_attention, flash_attention_2 ...", show_default="the model's"),
    ] = None,
    mode: Annotated[
        Literal["eager", "compiled", "graph"], typer.Option(help="compiled: torch.compile; graph: a CUDA graph.")
    ] = "eager",
    train: Annotated[bool, typer.Option("--train", help="Time a training step.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is timed.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="How often each runs before that.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.", show_default="PyTorch's")] = None,
    device: Device = "auto",
    as_json: Json = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV too.")] = None,
) -> None:
    """Time a model plain and at several budgets, in turn, with what else its forward costs.

    Options that are lists can be repeated; every combination is measured. Speed-ups are over the fastest plain variant.
    """
    import torch

    from ..benchmark.cases import CASES
    from ..benchmark.run import benchmark as measure
    from ..benchmark.run import environment
    from .loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    target = str(find_device(device))
    rows: list[BenchmarkRow] = []
    for name, chosen, batch in product(model, size or [None], batch_size):
        if name not in CASES and not Path(name).is_dir():
            raise ValueError(f"--model {name} is no checkpoint folder and none of {', '.join(CASES)}")
        case = CASES.get(name)
        torch.manual_seed(0)
        network: Any = None if case else load_model(name, any_head=True)
        pixels = _sides(chosen) or (case.size if case else _sides(getattr(network.config, "image_size", None)))
        if pixels is None:
            raise ValueError(f"--size is needed: the configuration of {name} has no image_size")
        network = case.build(pixels) if case else network
        plain = case.plain(pixels) if case and case.plain else None
        rows += measure(
            name, network, pixels, _budgets(network, keep_ratio, grouping, compressed_size), plain=plain,
            batch_size=batch, dtype=getattr(torch, dtype), device=target, attention=attention or (), mode=mode,
            train=train, rounds=rounds, warmup=warmup,
        )  # fmt: skip
        if csv_file is not None:
            _write_csv(rows, csv_file)
    where = environment(target)
    if as_json:
        typer.echo(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _print_table(rows, ", ".join(f"{name} {value}" for name, value in where.items()))


def _sides(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _budgets(
    network: Any, ratios: list[float], groupings: list[str] | None, sizes: list[Any] | None
) -> list[dict[str, Any]]:
    if hasattr(network.config, "compressed_sizes"):
        return [{"compressed_size": size} for size in sizes or network.config.compressed_sizes]
    if sizes:
        raise ValueError("--compressed-size is for LookupViT; give --keep-ratio")
    if groupings:
        return [{"keep_ratio": ratio, "grouping": name} for ratio, name in product(ratios, groupings)]
    return [{"keep_ratio": ratio} for ratio in ratios]


def _print_table(rows: list["BenchmarkRow"], title: str) -> None:
    headings = (
        "size", "batch", "GFLOPs", "ms (quartiles)", "speed-up (quartiles)", "of ideal", "grouping", "launches",
        "peak MiB", "images/s",
    )  # fmt: skip
    numbers = (Column(heading, justify="right") for heading in headings)
    table = Table("model", "variant", *numbers, title=title, title_justify="left")
    for row in rows:
        gain = "-"
        if row.speed_up is not None:
            gain = f"{row.speed_up:.2f} ({row.speed_up_low:.2f} to {row.speed_up_high:.2f})"
            gain += "" if row.different else ", no difference"
        table.add_row(
            row.model, row.variant, f"{row.height} x {row.width}", str(row.batch_size), _shown(row.gflops, ".1f"),
            f"{row.ms:.1f} ({row.ms_low:.1f} to {row.ms_high:.1f})", gain, _shown(row.share_of_ideal, ".0%"),
            _shown(row.grouping_share, ".1%"), _shown(row.launches, "d"), _shown(row.peak_mib, ".0f"),
            f"{row.images_per_second:.1f}",
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _write_csv(rows: list["BenchmarkRow"], path: Path) -> None:
    from ..utils.files import atomic_file

    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
