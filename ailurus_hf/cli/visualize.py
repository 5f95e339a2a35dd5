"""`ailurus-hf visualize`: what merging does to one picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.files import MARK, atomic_file, check_output_file, is_marked
from .options import (
    ClusterLayer,
    Device,
    Dtype,
    Grouping,
    KeepRatio,
    Model,
    load_on_device,
    load_processor,
    parse_output,
)

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

    from ..evaluation import Segmentation


FIGURE = "adaptive_resolution.png"


def visualize(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    model: Model,
    out: Annotated[
        Path, typer.Option(parser=parse_output, metavar="FILE", help="Picture to write: .png, .pdf or .svg.")
    ] = Path(FIGURE),
    keep_ratio: KeepRatio = None,
    grouping: Grouping = None,
    cluster_layer: ClusterLayer = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Draw one picture's clusters, its dense and merged predictions, and where they differ."""
    from ..budget import with_budget
    from ..data.images import read_image
    from ..evaluation import segment_image
    from ..visualization.figure import shown_stages

    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg, got {out}")
    check_output_file(out, is_figure)
    picture = read_image(image)
    settings = {"keep_ratio": keep_ratio, "grouping": grouping, "cluster_layer": cluster_layer}
    network = load_on_device(model, device, dtype, **settings)
    if not hasattr(network.config, "keep_ratio"):
        raise ValueError(
            f"--model {model} is a {type(network).__name__}, which merges no tokens: there are no clusters to draw; "
            "`ailurus-hf predict` draws its classes"
        )
    processor = load_processor(model)
    merged = segment_image(network, processor, picture)
    with with_budget(network, keep_ratio=1.0):
        dense = segment_image(network, processor, picture)
    save_figure(out, network, picture, dense, merged)
    agreement = float((dense.labels == merged.labels).mean())
    counts = [
        f"{stage.name}{': ' if stage.name else ''}{stage.num_tokens} of {stage.clusters.size} tokens"
        for stage in shown_stages(merged)
    ]
    typer.echo(f"{', '.join(counts)}, {agreement:.1%} of the pixels as in the dense model")
    typer.echo(f"written to {out}")


def save_figure(
    out: Path, model: "PreTrainedModel", picture: "Image.Image", dense: "Segmentation", merged: "Segmentation"
) -> None:
    """Write the figure that compares a dense and a merged segmentation."""
    from ..modeling.label_maps import class_names
    from ..visualization import adaptive_resolution_figure, model_palette

    config = model.config
    names = class_names(config.id2label, config.num_labels)
    figure = adaptive_resolution_figure(picture, dense, merged, model_palette(config), names)
    remark = "Software" if out.suffix.lower() == ".png" else "Creator"  # the name that each format has for it
    with atomic_file(out, is_figure) as path:
        figure.savefig(path, metadata={remark: MARK})


def is_figure(path: Path) -> bool:
    """Whether a file is a figure of this program's; those of earlier versions have no mark, but a name."""
    return path.name == FIGURE or is_marked(path)
