"""One file per source: signs of recognition, table of rules, config reader. This is the table of them."""

from collections.abc import Mapping

from ..recipe import Recipe
from . import ailurus, dino, dinov2, mae, mmseg, segformer, segmenter, timm, transformers_vit

__all__ = ["RECIPES"]

RECIPES: Mapping[str, Recipe] = {
    "segmenter": segmenter.RECIPE,
    "segformer": segformer.RECIPE,
    "transformers": transformers_vit.RECIPE,
    "dino": dino.RECIPE,
    "dinov2": dinov2.RECIPE,
    "mae": mae.RECIPE,
    "timm": timm.RECIPE,
    "mmseg": mmseg.RECIPE,
    "ailurus": ailurus.RECIPE,
}
