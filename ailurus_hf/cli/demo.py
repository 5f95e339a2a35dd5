"""`ailurus-hf demo`: a drawn street scene, segmented dense and merged by a small model that ships with the package."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from ..utils.files import check_output_directory, check_output_file
from .options import Json, load_on_device, load_processor, parse_output
from .visualize import FIGURE, is_figure, save_figure

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
MAX_SIDE = 2048  # the dense model's attention grows with the fourth power of it
FIRST_SEED = 2_000_000  # the model was trained and measured on scenes of other seeds


def demo(
    out: Annotated[Path, typer.Option(parser=parse_output, metavar="FOLDER", help="Folder for the picture.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Which scene to draw.")] = 0,
    keep_ratio: Annotated[float, typer.Option(help="Share of tokens to keep, above 0 and at most 1.")] = 0.25,
    height: Annotated[int, typer.Option(min=16, max=MAX_SIDE, help="Height of the scene in pixels.")] = 256,
    width: Annotated[int, typer.Option(min=16, max=MAX_SIDE, help="Width of the scene in pixels.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is timed.")] = 5,
    as_json: Json = False,
) -> None:
    """See AiluRus at work: no download, no data, under a minute.

    Draws a street scene the bundled model was not trained on, segments it with all tokens and with a share of them,
    prints both side by side and writes the figure that explains the method.
    """
    from PIL import Image

    from ..budget import with_budget
    from ..data import LabelledImage
    from ..demo.scenes import draw_scene
    from ..evaluation import evaluate_segmentation, segment_image

    picture = out / FIGURE
    check_output_directory(out, overwrite=True)
    check_output_file(picture, is_figure)
    model, processor = load_on_device(str(CHECKPOINT), "auto", None), load_processor(str(CHECKPOINT))
    scene = draw_scene(FIRST_SEED + seed, height, width)
    image = Image.fromarray(scene.image)
    samples = [LabelledImage(image, scene.labels, "the scene")] * rounds
    report = evaluate_segmentation(model, processor, samples, (1.0, keep_ratio), progress=False).rows()
    results, rows = [], []
    for name, measured in (("dense", report[0]), ("merged", report[-1])):
        with with_budget(model, keep_ratio=measured["keep_ratio"]):
            results.append(segment_image(model, processor, image))
        rows.append(
            {
                "variant": name,
                "tokens": results[-1].num_tokens,
                "gflops": round(measured["gflops"], 2),
                "milliseconds": round(measured["ms_per_picture"], 1),
                "agreement": round(measured["agreement"], 4),
                "mean_iou": round(measured["mean_iou"], 4),
            }
        )
    save_figure(picture, model, image, *results)
    if as_json:
        typer.echo(json.dumps({"figure": str(picture), "variants": rows}, indent=2))
        return
    _print(rows)
    typer.echo(f"written to {picture}")


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("", *(Column(title, justify="right") for title in ("tokens", "GFLOPs", "ms", "agreement", "mIoU")))
    for row in rows:
        table.add_row(
            row["variant"], str(row["tokens"]), f"{row['gflops']:.2f}", f"{row['milliseconds']:.1f}",
            f"{row['agreement']:.1%}", f"{row['mean_iou']:.3f}",
        )  # fmt: skip
    Console().print(table)
