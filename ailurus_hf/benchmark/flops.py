"""Counting floating-point operations without running the model."""

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..registry import architecture_of

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

    Raises:
        TypeError: the model is not one of this package's.
        ValueError: a setting is not allowed, or the image is too small.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        twin = type(model)(config).eval()
        pixel_values = torch.empty(1, config.num_channels, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(pixel_values)
    row = architecture_of(config)
    return int(counter.get_total_flops()) + row.extra_flops(config, row.stages(config, height, width))
