"""`ailurus-hf info`: what a checkpoint is and what it costs."""

import json
from typing import Annotated, Any

import typer

from .options import CompressedSize, Json, KeepRatio

MAX_SIDE = 100_000  # pixels; beyond, the sizes of tensors overflow
NAME_WIDTH = 28


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder, or a name on the Hub.")],
    height: Annotated[
        int | None, typer.Option(min=1, max=MAX_SIDE, help="Height of the images in pixels.", show_default="as trained")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, max=MAX_SIDE, help="Width of the images in pixels.", show_default="as trained")
    ] = None,
    keep_ratio: KeepRatio = None,
    compressed_size: CompressedSize = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's architecture, its tokens and budget, and its cost, dense and merged.

    GFLOPs count one multiply-add as two operations; clustering is included.
    """
    from .loading import load_model

    model = load_model(path, any_head=True, keep_ratio=keep_ratio, compressed_size=compressed_size)
    report = _describe(model, height, width)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for section, entries in report.items():
        typer.echo(section)
        for name, value in entries.items():
            typer.echo(f"  {name:<{NAME_WIDTH}} {value}")


def _describe(model: Any, height: int | None, width: int | None) -> dict[str, dict[str, Any]]:
    from ..architectures.row import FEATURES, SEGMENTATION, TASKS
    from ..benchmark import count_flops
    from ..modeling.label_maps import num_classes
    from ..registry import architecture_of

    config, row = model.config, architecture_of(model.config)
    auto_class = row.models[type(model).__name__]
    classes = num_classes(config) if auto_class == SEGMENTATION else config.num_labels
    size = (height or config.grid_size[0] * config.patch_size, width or config.grid_size[1] * config.patch_size)
    merges, flops = row.budget == "keep_ratio", count_flops(model, *size)
    costs: dict[str, Any] = {}
    for stage in row.stages(config, *size):
        name = f"{stage.name} tokens".lstrip()
        costs[name] = f"{' x '.join(map(str, stage.grid))} = {stage.num_tokens}"
        costs[f"{name} after merging" if merges else f"compressed {name}"] = stage.num_kept
    if merges:
        dense = count_flops(model, *size, keep_ratio=1.0)
        costs |= {"GFLOPs dense": round(dense / 1e9, 2), "GFLOPs merged": round(flops / 1e9, 2)}
        costs["ratio"] = round(dense / flops, 2)
    else:
        costs["GFLOPs"] = round(flops / 1e9, 2)
    kind = "image" if len(row.pixel_shape(config, *size)) == 4 else "video"
    return {
        "architecture": {
            "class": type(model).__name__,
            "parameters": f"{model.num_parameters():,}",
            "dtype": str(model.dtype).removeprefix("torch."),
            **row.facts(config, auto_class),
            **({} if TASKS[auto_class] == FEATURES else {"classes": classes}),
        },
        "merging" if merges else "compression": row.settings(config),
        f"one {kind} of {size[0]} x {size[1]} pixels": costs,
    }
