"""`ailurus-hf demo`: a drawn street scene, segmented dense and merged by a small model that ships with the package."""

import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, load_on_device, load_processor
from .visualize import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..demo.scenes import Scene
    from ..evaluation import Segmentation

__all__ = ["demo"]

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
FIRST_SEED = 2_000_000  # the model was trained and measured on scenes of other seeds


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(min=0, help="Which scene to draw.")] = 0,
    keep_ratio: Annotated[float, typer.Option(help="Share of tokens to keep, above 0 and at most 1.")] = 0.25,
    height: Annotated[int, typer.Option(min=16, help="Height of the scene in pixels.")] = 256,
    width: Annotated[int, typer.Option(min=16, help="Width of the scene in pixels.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is timed.")] = 5,
    as_json: Json = False,
) -> None:
    """See AiluRus at work: no download, no data, under a minute.

    Draws a street scene the bundled model was not trained on, segments it with all tokens and with a share of them,
    prints both side by side and writes the figure that explains the method.
    """
    from PIL import Image

    from ..demo.scenes import draw_scene
    from ..utils.files import check_output_directory

    check_output_directory(out, overwrite=True)
    model = load_on_device(str(CHECKPOINT), "auto", None)
    scene = draw_scene(FIRST_SEED + seed, height, width)
    rows, results = _compare(model, scene, {"dense": 1.0, "merged": keep_ratio}, rounds)
    picture = out / "adaptive_resolution.png"
    save_figure(picture, model, Image.fromarray(scene.image), results["dense"], results["merged"])
    if as_json:
        typer.echo(json.dumps({"figure": str(picture), "variants": rows}, indent=2))
        return
    _print(rows)
    typer.echo(f"written to {picture}")


def _compare(
    model: "PreTrainedModel", scene: "Scene", ratios: dict[str, float], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, "Segmentation"]]:
    import torch
    from PIL import Image

    from ..benchmark import count_flops, time_side_by_side
    from ..evaluation import ConfusionMatrix, segment_image

    processor, picture = load_processor(str(CHECKPOINT)), Image.fromarray(scene.image)
    results: dict[str, Segmentation] = {}

    def run(name: str) -> None:
        model.config.keep_ratio = ratios[name]
        results[name] = segment_image(model, processor, picture)

    seconds = time_side_by_side({name: partial(run, name) for name in ratios}, rounds)
    rows = []
    for name, ratio in ratios.items():
        quality = ConfusionMatrix(model.config.num_labels)
        quality.update(torch.from_numpy(results[name].labels), torch.from_numpy(scene.labels))
        rows.append(
            {
                "variant": name,
                "tokens": results[name].num_tokens,
                "gflops": round(count_flops(model, *scene.labels.shape, keep_ratio=ratio) / 1e9, 2),
                "milliseconds": round(median(seconds[name]) * 1e3, 1),
                "agreement": round(float((results[name].labels == results["dense"].labels).mean()), 4),
                "mean_iou": round(quality.mean_iou(), 4),
            }
        )
    return rows, results


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "tokens", "GFLOPs", "ms", "agreement", "mIoU"):
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(
            row["variant"], str(row["tokens"]), f"{row['gflops']:.2f}", f"{row['milliseconds']:.1f}",
            f"{row['agreement']:.1%}", f"{row['mean_iou']:.3f}",
        )  # fmt: skip
    Console().print(table)
