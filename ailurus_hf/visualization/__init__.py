"""Pictures: label maps in colour, and the figure that shows what merging does."""

from .figure import adaptive_resolution_figure
from .labels import colour_labels, indexed_image, model_palette, overlay

__all__ = ["adaptive_resolution_figure", "colour_labels", "indexed_image", "model_palette", "overlay"]
