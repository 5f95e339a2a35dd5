"""`ailurus-hf evaluate`: quality, cost and speed on pictures with labels."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..utils.files import atomic_file, check_output_file
from .options import (
    ClusterLayer,
    Device,
    Dtype,
    Json,
    Model,
    SkipUnreadable,
    SlidingWindow,
    load_on_device,
    load_processor,
    parse_output,
    parse_size,
)

if TYPE_CHECKING:
    from ..evaluation import EvaluationReport

MAX_SCALE = 16  # 256 times the pixels
COLUMNS = ("mean_iou", "agreement", "ms_per_picture")  # of every table

INTERVALS = {"mean_iou_difference": "mIoU - dense (95 %)", "agreement": "agreement (95 %)"}
SCORES = {"mean_iou": "mIoU", "pixel_accuracy": "pixel acc.", "boundary_f": "boundary F", "agreement": "agreement"}


def evaluate(
    model: Model,
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    labels: Annotated[
        Path,
        typer.Option(
            help="Folder of label maps: NAME.png or NAME.tif for each picture NAME, class ids as pixel values."
        ),
    ],
    keep_ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of tokens to keep; repeat for several. The dense model is always measured too.",
            show_default="1, 0.5 and 0.25",
        ),
    ] = None,
    flop_ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Keep as many tokens as make the forward cost so many times less than the dense one, grouping "
            "included; repeat for several. For pictures of the first one's size."
        ),
    ] = None,
    grouping: Annotated[
        list[str] | None,
        typer.Option(
            help="How tokens are grouped, such as region_merging or density_peaks; repeat for several, side by side.",
            show_default="the model's",
        ),
    ] = None,
    compressed_size: Annotated[
        list[Any] | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Grid of LookupViT's compressed tokens, such as 5 or 5x7; repeat for several. The largest takes the "
            "place of the dense model.",
            show_default="those of the training",
        ),
    ] = None,
    cluster_layer: ClusterLayer = None,
    ignore_index: Annotated[
        int | None, typer.Option(help="Label of pixels that do not count.", show_default="the model's")
    ] = None,
    reduce_labels: Annotated[
        bool, typer.Option("--reduce-labels", help="Subtract 1 from every label, ignore 0 (ADE20K's files).")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first pictures.")] = None,
    sliding_window: SlidingWindow = False,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the prediction of the mirror image.")] = False,
    scale: Annotated[
        list[float] | None,
        typer.Option(min=0, max=MAX_SCALE, help="Average over pictures resized by this factor; repeat for several."),
    ] = None,
    boundary: Annotated[bool, typer.Option("--boundary", help="Score the classes' boundaries too.")] = False,
    intervals: Annotated[
        bool,
        typer.Option(
            "--intervals", help="Print 95 % intervals of agreement and of the mIoU's difference (paired bootstrap)."
        ),
    ] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the IoU of every class too.")] = False,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", parser=parse_output, metavar="FILE", help="Write the table's rows as CSV too."),
    ] = None,
) -> None:
    """Evaluate a checkpoint on pictures with labels, at several budgets side by side.

    Every picture is predicted at all budgets in turn, from the picture to its label map, so that their times are
    measured under the same conditions. Speed-ups and agreement are with the dense model, of LookupViT with the largest
    compressed size.
    """
    from ..data import SegmentationFolder
    from ..data.label_maps import pair_files
    from ..data.labelled import LabelRule
    from ..evaluation import evaluate_segmentation
    from ..modeling.label_maps import num_classes

    if csv_file is not None:
        check_output_file(csv_file, _is_table)
    pairs = pair_files(images, labels)[:limit]
    network = load_on_device(model, device, dtype, cluster_layer=cluster_layer)
    ignored = network.config.semantic_loss_ignore_index if ignore_index is None else ignore_index
    processor = load_processor(model)
    samples = SegmentationFolder(pairs, LabelRule(num_classes(network.config), ignored, reduce_labels))
    if flop_ratio and sliding_window:
        raise ValueError("--flop-ratio is for whole pictures: leave out --sliding-window, or give --keep-ratio")
    size = processor(samples[0].image, return_tensors="pt")["pixel_values"].shape[-2:] if flop_ratio else None
    report = evaluate_segmentation(
        network,
        processor,
        samples,
        _budgets(network, keep_ratio or [], flop_ratio or [], size, grouping or [], compressed_size or []),
        ignore_index=ignored,
        boundary=boundary,
        intervals=intervals,
        skip_unreadable=skip_unreadable,
        sliding_window=sliding_window,
        flip=flip,
        scales=scale or (1.0,),
    )
    if csv_file is not None:
        _write_csv(report, csv_file)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    for line in report.skipped:
        typer.echo(f"ailurus-hf: warning: skipped: {line}", err=True)
    _print_table(report, f"{network.device}, {str(network.dtype).removeprefix('torch.')}")
    if per_class:
        _print_classes(report)


def _budgets(
    network: Any,
    keep_ratios: list[float],
    flop_ratios: list[float],
    size: tuple[int, int] | None,
    groupings: list[str],
    compressed_sizes: list[Any],
) -> list[dict[str, Any]] | None:
    """What the options name; None where they name nothing. `size` is that of a picture, for the FLOP ratios."""
    from ..benchmark import keep_ratio_at

    if groupings and not (keep_ratios or flop_ratios):
        keep_ratios = [0.5, 0.25]
    budgets: list[dict[str, Any]] = []
    for ratio in keep_ratios:
        budgets += [{"keep_ratio": ratio, **chosen} for chosen in _groupings(groupings)]
    for ratio in flop_ratios:
        assert size is not None
        for chosen in _groupings(groupings):
            budgets.append({"keep_ratio": keep_ratio_at(network, *size, ratio, **chosen), **chosen})
    return [*budgets, *({"compressed_size": size} for size in compressed_sizes)] or None


def _groupings(names: list[str]) -> list[dict[str, Any]]:
    return [{"grouping": name} for name in names] or [{}]


def _print_table(report: "EvaluationReport", where: str) -> None:
    import torch

    threads = f", {torch.get_num_threads()} threads" if where.startswith("cpu") else ""
    rows = report.rows()
    scores = {name: title for name, title in SCORES.items() if name in rows[0]}
    shown = {name: title for name, title in INTERVALS.items() if f"{name}_low" in rows[0]}
    headings = (*report.settings(), *scores.values(), *shown.values(), "GFLOPs", "ms", "speed-up (quartiles)")
    table = Table(*map(_numbers, headings), title=f"{report.num_pictures} pictures, {where}{threads}")
    for row in rows:
        gflops = "-" if row["gflops"] is None else f"{row['gflops']:.1f}"
        speed = f"{row['speed_up']:.2f} ({row['speed_up_low']:.2f} to {row['speed_up_high']:.2f})"
        quality = (_number(row[name]) for name in scores)
        settings = (_named(row[name]) for name in report.settings())
        spread = (_interval(row[f"{name}_low"], row[f"{name}_high"], name != "agreement") for name in shown)
        table.add_row(*settings, *quality, *spread, gflops, f"{row['ms_per_picture']:.0f}", speed)
    _print(table)


def _print_classes(report: "EvaluationReport") -> None:
    budgets = report.to_dict()["budgets"]
    headings = ("\n".join(_named(budget[name]) for name in report.settings()) for budget in budgets)
    table = Table("class", *map(_numbers, headings), title="IoU")
    for name in budgets[0]["iou"]:
        table.add_row(name, *(_number(budget["iou"][name]) for budget in budgets))
    _print(table)


def _named(setting: float | str | None) -> str:
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting or "")


def _interval(low: float, high: float, signed: bool) -> str:
    return f"{low:+.4f} to {high:+.4f}" if signed else f"{low:.4f} to {high:.4f}"


def _numbers(heading: str) -> Column:
    return Column(heading, justify="right")


def _print(table: Table) -> None:
    table.title_justify = "left"
    console = Console()
    # A pipe has no width of its own; a table that is cut there helps nobody.
    (console if console.is_terminal else Console(width=200)).print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _write_csv(report: "EvaluationReport", path: Path) -> None:
    rows = report.rows()
    with atomic_file(path, _is_table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _is_table(path: Path) -> bool:
    """Whether a file is a table that this command wrote: CSV has no place for a mark."""
    with path.open("rb") as file:
        columns = file.readline(4096).decode(errors="replace").strip().split(",")
    return set(COLUMNS) <= set(columns)
