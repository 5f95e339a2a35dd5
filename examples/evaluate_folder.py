"""Quality and speed of a segmentation model on a folder of pictures with labels, dense and at several budgets.

python examples/evaluate_folder.py MODEL --images DIR --labels DIR --keep-ratio 0.5 --keep-ratio 0.25

Labels are PNG files with class ids as pixel values, named like the pictures. Every picture is predicted at all budgets
in turn, so that the times of all rows were measured under the same conditions.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from ailurus_hf.benchmark import count_flops, speed_up, time_side_by_side
from ailurus_hf.evaluation import ConfusionMatrix, Segmentation, segment_image
from ailurus_hf.images import list_images, read_image


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or name on the Hub.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    labels: Annotated[Path, typer.Option(help="Folder of label maps.")],
    keep_ratio: Annotated[list[float], typer.Option(help="Budget; repeat for several.")] = [0.5, 0.25],  # noqa: B006
    ignore_index: Annotated[int, typer.Option(help="Label of pixels that do not count.")] = 255,
    limit: Annotated[int | None, typer.Option(help="Use only the first pictures.")] = None,
) -> None:
    network = AutoModelForSemanticSegmentation.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    ratios = [1.0, *(ratio for ratio in keep_ratio if ratio != 1)]
    quality = {ratio: ConfusionMatrix(network.config.num_labels, ignore_index) for ratio in ratios}
    seconds: dict[float, list[float]] = {ratio: [] for ratio in ratios}
    agreement: dict[float, list[float]] = {ratio: [] for ratio in ratios}

    files = list_images([images])[:limit]
    for number, file in enumerate(track(files, console=Console(stderr=True))):
        picture = read_image(file)
        truth = torch.tensor(np.asarray(Image.open(labels / f"{file.stem}.png")))
        found: dict[float, Segmentation] = {}

        def predict(ratio: float) -> None:
            network.config.keep_ratio = ratio
            found[ratio] = segment_image(network, processor, picture)  # noqa: B023  called within the iteration

        variants = {str(ratio): (lambda ratio=ratio: predict(ratio)) for ratio in ratios}
        times = time_side_by_side(variants, rounds=1, warmup=1 if number == 0 else 0)
        for ratio in ratios:
            seconds[ratio] += times[str(ratio)]
            quality[ratio].update(torch.tensor(found[ratio].labels), truth)
            agreement[ratio].append(float((found[ratio].labels == found[1.0].labels).mean()))

    pixels = processor(read_image(files[0]), return_tensors="pt")["pixel_values"]
    flops = {ratio: count_flops(network, *pixels.shape[-2:], keep_ratio=ratio) for ratio in ratios}
    table = Table(
        title=f"{len(files)} pictures, {torch.get_num_threads()} threads, {network.dtype}", title_justify="left"
    )
    for name in ("keep_ratio", "mIoU", "pixel accuracy", "agreement", "GFLOPs", "ratio", "ms", "speed-up (quartiles)"):
        table.add_column(name, justify="right")
    for ratio in ratios:
        gain = speed_up(seconds[1.0], seconds[ratio])
        table.add_row(
            f"{ratio:g}", f"{quality[ratio].mean_iou():.4f}", f"{quality[ratio].pixel_accuracy():.4f}",
            f"{np.mean(agreement[ratio]):.4f}", f"{flops[ratio] / 1e9:.1f}", f"{flops[1.0] / flops[ratio]:.2f}",
            f"{np.median(seconds[ratio]) * 1e3:.0f}", f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
