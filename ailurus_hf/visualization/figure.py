"""The figure that explains adaptive resolution on one picture. Needs matplotlib, which the extra `viz` brings."""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..evaluation.inference import ClusterMap, Segmentation
from ..utils.extras import needs_extra
from .labels import colour_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["adaptive_resolution_figure", "cluster_borders"]

BORDER = "#ffe14d"
DIFFERENT = np.array([230, 30, 60], dtype=np.uint8)
MAX_LEGEND_CLASSES = 20


def adaptive_resolution_figure(
    image: Image.Image, dense: Segmentation, merged: Segmentation, palette: np.ndarray, names: list[str]
) -> "Figure":
    """Picture, clusters of every stage that merges, dense prediction, merged prediction, and where the two differ.

    Args:
        image: the picture.
        dense: its segmentation with nothing merged.
        merged: its segmentation on merged tokens, with clusters.
        palette: colours of the classes, (num_labels, 3) uint8.
        names: names of the classes.

    Returns:
        A matplotlib figure; save it with `figure.savefig(path)`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `merged` has no clusters, since it comes from sliding windows or its model has none.
    """
    with needs_extra("viz", "figures"):
        from matplotlib.figure import Figure

    stages = shown_stages(merged)
    columns = max((len(stages) + 6) // 2, len(stages) + 1)  # two rows for the clusters, four pictures and the legend
    panel_height = 3.2
    panel_width = max(panel_height * image.width / image.height, 4.0)  # the legend's text needs as much
    size = (columns * panel_width + 0.4, 2 * panel_height + 0.9)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, columns)
    for axes in (*top, *bottom):
        axes.set_axis_off()
    differs = dense.labels != merged.labels
    _show(top[0], image, f"Image: {image.height} x {image.width} pixels")
    for axes, stage in zip(top[1:], stages, strict=False):
        total, kept = stage.clusters.size, stage.num_tokens
        _show(axes, image, f"{stage.name or 'clusters'}: {kept} of {total} tokens ({kept / total:.0%})".capitalize())
        _draw_clusters(axes, stage)
    _show(bottom[0], colour_labels(dense.labels, palette), "Dense: every layer on all tokens")
    _show(bottom[1], colour_labels(merged.labels, palette), "Merged: later layers on the clusters")
    _show(bottom[2], _mark(image, differs), f"Different: {differs.mean():.1%} of the pixels, in red")
    free = [*top[1 + len(stages) :], *bottom[3:]]
    _explain(free[0], dense.labels, merged.labels, palette, names)
    return figure


def shown_stages(merged: Segmentation) -> list[ClusterMap]:
    """The stages that merge; the last one where none does.

    Raises:
        ValueError: the segmentation has no clusters.
    """
    if not merged.stages:
        raise ValueError(
            "merged must have clusters, got a segmentation by sliding windows, of a model without, or of a picture "
            "that the image processor cuts at its first row or column (do_center_crop=False leaves it whole)"
        )
    merging = [stage for stage in merged.stages if stage.num_tokens < stage.clusters.size]
    return merging or [merged.stages[-1]]


def cluster_borders(clusters: np.ndarray, patch_size: tuple[float, float]) -> np.ndarray:
    """Line segments between neighbouring patches of different clusters.

    Args:
        clusters: (rows, columns), cluster of every patch.
        patch_size: height and width of a patch in pixels.

    Returns:
        (num_segments, 2, 2): start and end of each segment as (x, y) in pixels.
    """
    height, width = patch_size
    rows, columns = np.nonzero(clusters[1:] != clusters[:-1])
    y, x = (rows + 1) * height, columns * width
    horizontal = np.stack([np.stack([x, y], -1), np.stack([x + width, y], -1)], axis=1)
    rows, columns = np.nonzero(clusters[:, 1:] != clusters[:, :-1])
    y, x = rows * height, (columns + 1) * width
    vertical = np.stack([np.stack([x, y], -1), np.stack([x, y + height], -1)], axis=1)
    return np.concatenate([horizontal, vertical])


def _show(axes: "Axes", image: Image.Image, title: str) -> None:
    # In pixels from the upper left corner of the upper left pixel, like the borders of the clusters.
    axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0), interpolation="nearest")
    axes.set_title(title, fontsize=11)


def _draw_clusters(axes: "Axes", stage: ClusterMap) -> None:
    from matplotlib.collections import LineCollection

    borders = cluster_borders(stage.clusters, stage.patch_size)
    lines = LineCollection(list(borders), colors=BORDER, linewidths=0.8)
    axes.add_collection(lines, autolim=False)  # the last patches may reach beyond the picture


def _explain(axes: "Axes", dense: np.ndarray, merged: np.ndarray, palette: np.ndarray, names: list[str]) -> None:
    """Legend of the classes that occur, most frequent first."""
    from matplotlib.patches import Patch

    counts = np.bincount(np.concatenate([dense.ravel(), merged.ravel()]), minlength=len(names))
    present = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    handles: list[Any] = [
        Patch(facecolor=palette[label] / 255, edgecolor="none", label=names[label])
        for label in present[:MAX_LEGEND_CLASSES]
    ]
    axes.legend(handles=handles, loc="upper left", ncols=3, frameon=False, fontsize=10)
    text = (
        "Look-alike patches inside objects share one token\n(large cells); patches along contours keep their\n"
        "own (fine grid). Later layers run on this short\nsequence, each token weighed by its size; then the\n"
        "full grid is unfolded."
    )
    axes.text(0.03, 0.03, text, va="bottom", fontsize=11, linespacing=1.4, transform=axes.transAxes)


def _mark(image: Image.Image, differs: np.ndarray) -> Image.Image:
    """The picture in light grey, with the pixels that differ in red."""
    grey = np.asarray(ImageOps.grayscale(image).convert("RGB")).astype(np.float32)
    pixels = (255 - (255 - grey) * 0.6).astype(np.uint8)
    pixels[differs] = DIFFERENT
    return Image.fromarray(pixels)
