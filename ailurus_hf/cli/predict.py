"""`ailurus-hf predict`: pictures to label maps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ..utils.files import atomic_file, check_output_directory
from .options import ClusterLayer, Device, Dtype, Json, KeepRatio, Model, SlidingWindow, load_on_device, load_processor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..evaluation import Segmentation


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of them.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results; existing ones are replaced.")] = Path(
        "predictions"
    ),
    keep_ratio: KeepRatio = None,
    cluster_layer: ClusterLayer = None,
    sliding_window: SlidingWindow = False,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Segment pictures with a checkpoint.

    For each picture NAME, OUT gets NAME.labels.png (class ids as pixel values), NAME.overlay.png (the classes' colours
    on the picture) and NAME.json (the classes and the share of pixels each has).
    """
    from ..data.images import list_images, read_image
    from ..data.label_maps import check_equal_names
    from ..evaluation import segment_image
    from ..visualization import model_palette

    files = list_images(images)
    check_equal_names(files, [file.stem for file in files], "be written as {}.*")
    check_output_directory(out, overwrite=True)  # it would be a pity to find out after the model has run
    network = load_on_device(model, device, dtype, keep_ratio=keep_ratio, cluster_layer=cluster_layer)
    processor, palette = load_processor(model), model_palette(network.config)
    names = [network.config.id2label[label] for label in range(network.config.num_labels)]
    reports = []
    for file in tqdm(files, "predicting", leave=False, disable=None):
        picture = read_image(file)
        result = segment_image(network, processor, picture, sliding_window)
        report = _describe(file, picture, result, names)
        _write(out, file.stem, picture, result.labels, palette, report)
        reports.append(report)
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
        return
    for report in reports:
        shares = sorted(report["classes"], key=lambda entry: -entry["share"])[:4]
        summary = ", ".join(f"{entry['name']} {entry['share']:.0%}" for entry in shares)
        typer.echo(f"{report['image']}: {summary}")
    typer.echo(f"written to {out}: {len(files)} x .labels.png, .overlay.png, .json")


def _describe(file: Path, picture: "Image.Image", result: "Segmentation", names: list[str]) -> dict[str, Any]:
    import numpy as np

    counts = np.bincount(result.labels.ravel(), minlength=len(names))
    return {
        "image": str(file),
        "height": picture.height,
        "width": picture.width,
        "patches": None if result.clusters is None else result.clusters.size,
        "tokens": result.num_tokens,
        "classes": [
            {"id": label, "name": names[label], "share": round(int(count) / result.labels.size, 6)}
            for label, count in enumerate(counts)
            if count
        ],
    }


def _write(
    out: Path, stem: str, picture: "Image.Image", labels: "np.ndarray", palette: "np.ndarray", report: dict[str, Any]
) -> None:
    from ..visualization import indexed_image, overlay

    with atomic_file(out / f"{stem}.labels.png") as path:
        indexed_image(labels, palette).save(path)
    with atomic_file(out / f"{stem}.overlay.png") as path:
        overlay(picture, labels, palette).save(path)
    with atomic_file(out / f"{stem}.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
