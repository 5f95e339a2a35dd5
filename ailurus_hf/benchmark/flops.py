"""Counting floating-point operations without running the model."""

import copy
import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..modeling.configuration_ailurus_segformer import AiluRusSegformerConfig
from ..modeling.settings import resolve_num_groups

__all__ = ["count_flops"]


def count_flops(model: PreTrainedModel, height: int, width: int, **settings: Any) -> int:
    """Floating-point operations of one image's forward, clustering included.

    Matrix products, convolutions and attention are counted by PyTorch's own counter on a copy of the model without
    data, so that the largest models take a moment; one multiply-add is two operations. The clustering's distances,
    which are no matrix product, are added by formula. All tokens are counted as if no representative were nearby.

    Args:
        model: an AiluRus model; left as it is.
        height, width: size of the image in pixels.
        settings: fields of the configuration to change for the count, such as `keep_ratio=1`.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        twin = type(model)(config).eval()
        pixel_values = torch.empty(1, config.num_channels, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(pixel_values)
    return int(counter.get_total_flops()) + _distance_flops(config, height, width)


def _distance_flops(config: Any, height: int, width: int) -> int:
    """Subtract, square and add over the hidden size, once for each pair of neighbours."""
    pairs = math.ceil(config.neighborhood_size / 2)
    return sum(3 * hidden_size * num_tokens * pairs for hidden_size, num_tokens in _clusterings(config, height, width))


def _clusterings(config: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Width and number of the tokens of every clustering in a forward."""
    if isinstance(config, AiluRusSegformerConfig):
        grids = config.stage_grids(height, width)
        stages = list(zip(config.stage_ratios, grids, config.hidden_sizes, strict=True))
    else:
        stages = [(config.keep_ratio, config.patch_grid(height, width), config.hidden_size)]
    found = []
    for ratio, (rows, columns), hidden_size in stages:
        exact = None if ratio == 1 and isinstance(config, AiluRusSegformerConfig) else config.num_clusters
        if resolve_num_groups(rows * columns, ratio, exact) < rows * columns:
            found.append((hidden_size, rows * columns))
    return found
