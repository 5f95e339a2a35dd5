"""Counting floating-point operations without running the model."""

import copy
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..modeling.settings import refuse_unknown, replaced_by
from ..registry import architecture_of

__all__ = ["count_flops", "keep_ratio_at"]


def count_flops(
    model: PreTrainedModel,
    height: int,
    width: int,
    forward: Callable[[Any, torch.Tensor], object] | None = None,
    **settings: Any,
) -> int:
    """Floating-point operations of one image's forward, clustering included; of a video model, of one video's.

    Matrix products, convolutions and attention are counted by PyTorch's own counter on a copy of the model without
    data, so that the largest models take a moment; one multiply-add is two operations. The clustering's distances,
    which are no matrix product, are added by formula. All tokens are counted as if no representative were nearby.

    Args:
        model: an AiluRus model, or one that PEFT has wrapped, whose own layers count too; left as it is.
        height, width: size of the image in pixels.
        forward: what is run, where it is not one forward: a function of the model's copy and `pixel_values` (1,
            num_channels, height, width) that calls the copy as often as it likes, such as for sliding windows.
        settings: fields of the configuration to change for the count, such as `keep_ratio=1`, which takes the place of
            exact numbers.

    Raises:
        TypeError: the model is not one of this package's, or has no such setting.
        ValueError: a setting is not allowed, or the image is too small.
    """
    twin, config = _twin(model, settings)
    row = architecture_of(config)
    clustering = 0

    def count_clustering(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal clustering
        images = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        clustering += len(images) * row.extra_flops(config, row.stages(config, *images.shape[-2:]))

    twin.register_forward_pre_hook(count_clustering, with_kwargs=True)
    pixel_values = torch.empty(row.pixel_shape(config, height, width), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(pixel_values) if forward is None else forward(twin, pixel_values)
    return int(counter.get_total_flops()) + clustering


def keep_ratio_at(model: PreTrainedModel, height: int, width: int, flop_ratio: float, **settings: Any) -> float:
    """The share of tokens to keep for a forward that costs a given fraction of the dense one, clustering included: what
    compares methods at equal cost.

    Args:
        model, height, width: as in `count_flops`.
        flop_ratio: dense operations over merged ones, above 1.
        settings: others that hold beside the ratio, such as `grouping="density_peaks"`.

    Returns:
        The largest such share of the image's tokens.

    Raises:
        TypeError: as `count_flops`; also for a model whose budget is no share of its tokens.
        ValueError: `flop_ratio` is out of range, or beyond reach: the layers that run on all tokens cost too much.
    """
    if not flop_ratio > 1:
        raise ValueError(f"flop_ratio must be above 1, got {flop_ratio:g}; keep_ratio=1 is the dense model")
    dense = count_flops(model, height, width, keep_ratio=1.0)
    num_tokens = max(stage.num_tokens for stage in architecture_of(model.config).stages(model.config, height, width))

    def fits(count: int) -> bool:
        return dense >= flop_ratio * count_flops(model, height, width, keep_ratio=count / num_tokens, **settings)

    # Cheap enough up to some number of tokens, and none above it.
    most = bisect_left(range(1, num_tokens + 1), True, key=lambda count: not fits(count))
    if most == 0:
        raise ValueError(
            f"flop_ratio={flop_ratio:g} is beyond reach with these settings, even a single token kept costs too much; "
            "lower it, or merge after fewer layers (cluster_layer)"
        )
    return most / num_tokens


def _twin(model: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A copy of the model without data, with other settings, and its configuration."""
    unknown = [name for name in settings if not hasattr(model.config, name)]
    refuse_unknown("count_flops", unknown, list(vars(model.config)))
    settings = {
        **{name: value for name, value in replaced_by(settings).items() if hasattr(model.config, name)},
        **settings,
    }
    if not hasattr(model, "peft_config"):
        config = copy.deepcopy(model.config)
        for name, value in settings.items():
            setattr(config, name, value)
        with torch.device("meta"):
            return type(model)(config).eval(), config
    # What PEFT has put into a model is in no configuration: the layers are copied, their data is not.
    empty: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    twin = copy.deepcopy(model, empty).eval()
    config = twin.get_base_model().config
    for name, value in settings.items():
        setattr(config, name, value)
    return twin, config
