"""`ailurus-hf info`: what a checkpoint is and what it costs."""

import json
from typing import Annotated, Any

import typer

from .options import Json, KeepRatio

NAME_WIDTH = 28


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder, or a name on the Hub.")],
    height: Annotated[
        int | None, typer.Option(min=1, help="Height of the images in pixels.", show_default="as trained")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Width of the images in pixels.", show_default="as trained")
    ] = None,
    keep_ratio: KeepRatio = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's architecture, its tokens and merge settings, and its cost, dense and merged.

    GFLOPs count one multiply-add as two operations; clustering is included.
    """
    from .loading import load_model

    model = load_model(path, any_head=True, keep_ratio=keep_ratio)
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
    dense, merged = count_flops(model, *size, keep_ratio=1.0), count_flops(model, *size)
    tokens: dict[str, Any] = {}
    for stage in row.stages(config, *size):
        name = f"{stage.name} tokens".lstrip()
        tokens[name] = f"{stage.grid[0]} x {stage.grid[1]} = {stage.num_tokens}"
        tokens[f"{name} after merging"] = stage.num_kept
    return {
        "architecture": {
            "class": type(model).__name__,
            "parameters": f"{model.num_parameters():,}",
            "dtype": str(model.dtype).removeprefix("torch."),
            **row.facts(config, auto_class),
            **({} if TASKS[auto_class] == FEATURES else {"classes": classes}),
        },
        "merging": row.settings(config),
        f"one image of {size[0]} x {size[1]} pixels": {
            **tokens,
            "GFLOPs dense": round(dense / 1e9, 2),
            "GFLOPs merged": round(merged / 1e9, 2),
            "ratio": round(dense / merged, 2),
        },
    }
