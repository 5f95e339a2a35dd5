"""The figure that explains adaptive resolution on one picture. Needs matplotlib (`pip install 'ailurus-hf[viz]'`)."""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..evaluation.inference import Segmentation
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
    """Picture, clusters, dense prediction, merged prediction, and where the two differ.

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
        ValueError: `merged` has no clusters, since it comes from sliding windows.
    """
    with needs_extra("viz", "figures"):
        from matplotlib.figure import Figure

    if merged.clusters is None:
        raise ValueError("merged must have clusters, got a segmentation by sliding windows or of a hierarchical model")
    wide = image.width / image.height
    panel_height = 3.2
    figure = Figure(figsize=(3 * panel_height * wide + 0.4, 2 * panel_height + 0.9), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    differs = dense.labels != merged.labels
    total, kept = merged.clusters.size, merged.num_tokens or 0
    _show(axes[0, 0], image, f"Image: {merged.clusters.shape[0]} x {merged.clusters.shape[1]} = {total} patches")
    _show(axes[0, 1], image, f"Clusters: {kept} tokens ({kept / total:.0%})")
    _draw_clusters(axes[0, 1], merged)
    _explain(axes[0, 2], dense.labels, merged.labels, palette, names)
    _show(axes[1, 0], colour_labels(dense.labels, palette), f"Dense: every layer on {total} tokens")
    _show(axes[1, 1], colour_labels(merged.labels, palette), f"Merged: later layers on {kept} tokens")
    _show(axes[1, 2], _mark(image, differs), f"Different: {differs.mean():.1%} of the pixels, in red")
    return figure


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
    axes.set_axis_off()


def _draw_clusters(axes: "Axes", merged: Segmentation) -> None:
    from matplotlib.collections import LineCollection

    assert merged.clusters is not None  # checked by the caller
    assert merged.patch_size is not None  # comes with the clusters
    borders = cluster_borders(merged.clusters, merged.patch_size)
    axes.add_collection(LineCollection(list(borders), colors=BORDER, linewidths=0.8))


def _explain(axes: "Axes", dense: np.ndarray, merged: np.ndarray, palette: np.ndarray, names: list[str]) -> None:
    """Legend of the classes that occur, most frequent first."""
    from matplotlib.patches import Patch

    counts = np.bincount(np.concatenate([dense.ravel(), merged.ravel()]), minlength=len(names))
    present = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    handles: list[Any] = [
        Patch(facecolor=palette[label] / 255, edgecolor="none", label=names[label])
        for label in present[:MAX_LEGEND_CLASSES]
    ]
    axes.set_axis_off()
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
