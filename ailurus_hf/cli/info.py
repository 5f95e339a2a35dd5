"""`ailurus-hf info`: what a checkpoint is and what it costs."""

import json
from typing import Annotated, Any

import typer

from .options import Json, KeepRatio

__all__ = ["info"]


def info(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint folder, or a name on the Hub.")],
    height: Annotated[
        int | None, typer.Option(help="Height of the images in pixels.", show_default="as trained")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Width of the images in pixels.", show_default="as trained")] = None,
    keep_ratio: KeepRatio = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's architecture, its tokens and merge settings, and its cost, dense and merged.

    GFLOPs count one multiply-add as two operations; clustering is included.
    """
    from .loading import load_model

    model = load_model(path, keep_ratio=keep_ratio)
    report = _describe(model, height, width)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for section, entries in report.items():
        typer.echo(section)
        for name, value in entries.items():
            typer.echo(f"  {name:<22} {value}")


def _describe(model: Any, height: int | None, width: int | None) -> dict[str, dict[str, Any]]:
    from dataclasses import fields

    from ..benchmark import count_flops
    from ..modeling.configuration_ailurus import AiluRusConfig
    from ..modeling.settings import AdaptiveResolutionMixin, resolve_num_groups

    config = model.config
    if config.model_type != AiluRusConfig.model_type:
        raise ValueError(f"info describes plain vision transformers, not {config.model_type} models")
    trained = [side * config.patch_size for side in config.grid_size]
    size = (height or trained[0], width or trained[1])
    if min(size) < config.patch_size:
        raise ValueError(
            f"--height and --width must be at least one patch of {config.patch_size} pixels, got {size[0]} x {size[1]}"
        )
    rows, columns = config.patch_grid(*size)
    dense, merged = count_flops(model, *size, keep_ratio=1.0, num_clusters=None), count_flops(model, *size)
    return {
        "architecture": {
            "class": type(model).__name__,
            "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "heads": config.num_attention_heads,
            "patch size": config.patch_size,
            "head": config.decode_head.type,
            "classes": config.num_labels,
        },
        "merging": {field.name: getattr(config, field.name) for field in fields(AdaptiveResolutionMixin)},
        f"one image of {size[0]} x {size[1]} pixels": {
            "tokens": f"{rows} x {columns} = {rows * columns}",
            "tokens after merging": resolve_num_groups(rows * columns, config.keep_ratio, config.num_clusters),
            "GFLOPs dense": round(dense / 1e9, 2),
            "GFLOPs merged": round(merged / 1e9, 2),
            "ratio": round(dense / merged, 2),
        },
    }
