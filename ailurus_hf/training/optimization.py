"""Learning rates that fall towards the input, and budgets that change during training."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..budget import set_keep_ratio

__all__ = ["KeepRatioSchedule", "freeze_layers", "layerwise_parameter_groups"]


def layerwise_parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a smaller learning rate the closer a layer is to the input.

    With n encoder layers the head learns at `learning_rate`, layer l (from 0) at `learning_rate * layer_decay**(n - l)`
    and the embeddings at `learning_rate * layer_decay**(n + 1)` (BEiT, arXiv 2106.08254, appendix H). What stands
    between two layers, such as the patch embeddings of a later stage, learns like the layer after it, and what follows
    the last layer like the head. Of several encoders, such as the towers of a model for pictures and text, each has its
    own n. Biases, norms, tokens and positions have no weight decay.

    Args:
        model: a model of this package or of transformers, or what holds or wraps one, such as UperNet on a backbone or
            a PEFT model; only parameters that require gradients are listed.
        learning_rate: of the head.
        weight_decay: of matrices and kernels.
        layer_decay: factor from one layer to the one before it, above 0 and at most 1.

    Raises:
        ValueError: `layer_decay` is out of range, or below 1 for a model in which no layers are found.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    depths = _depths(model)
    if layer_decay < 1 and not depths:
        raise ValueError(f"layer_decay must be 1 for {type(model).__name__}, which has no encoder with layers")
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = _decays(name, parameter) and id(parameter) not in tables
            groups[depths.get(id(parameter), _HEAD).to_head, decays].append(parameter)
    return [
        {
            "params": groups[to_head, decays],
            "lr": learning_rate * layer_decay**to_head,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for to_head, decays in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def freeze_layers(model: nn.Module, count: int) -> None:
    """Stop training the embeddings and the first `count` encoder layers, and what stands between these; 0 trains all.

    Nothing is computed for them in the backward pass, which saves the most where the first layers run on all tokens and
    the others on merged ones: with `count = config.num_dense_layers` the backward pass ends where they were merged. Of
    several encoders those with fewer layers are frozen up to their last one.

    Args:
        model: as in `layerwise_parameter_groups`.
        count: number of layers; those of a hierarchical encoder are counted through its stages.

    Raises:
        ValueError: `count` is negative or above the number of layers.
    """
    depths = _depths(model)
    most = max((depth.level + depth.to_head for depth in depths.values()), default=1) - 1
    if not 0 <= count <= most:
        raise ValueError(f"count must be from 0 to the number of layers {most}, got {count}")
    if count:
        for parameter in model.parameters():
            depth = depths.get(id(parameter), _HEAD)
            if depth.to_head and depth.level <= count:
                parameter.requires_grad_(False)


class _Depth(NamedTuple):
    """Where a parameter stands: 0 before the first layer, 1 in it or right before the second, ...; levels to go."""

    level: int
    to_head: int


_HEAD = _Depth(0, 0)
# Registered before the layers, used behind them (EoMT).
_LATE = r"(layer)?norm|query"


def _depths(model: nn.Module) -> dict[int, _Depth]:
    """Depth of each parameter by its id; those that are not listed belong to the head. Empty without layers."""
    depths: dict[int, _Depth] = {}
    for encoder in _encoders(model):
        names = {id(module): name for name, module in encoder.named_modules()}
        steps = list(_in_order(encoder))
        last, passed = sum(map(_is_layer, steps)) + 1, 0
        for step in steps:
            passed += _is_layer(step)
            level = passed if _is_layer(step) or not passed else passed + 1
            if level == 0 and re.fullmatch(_LATE, names[id(step)]):
                level = last
            for name, parameter in step.named_parameters(recurse=_is_layer(step)):
                early = level == last and "position" in name
                depths[id(parameter)] = _Depth(0, last) if early else _Depth(level, last - level)
    return depths


def _encoders(model: nn.Module) -> list[nn.Module]:
    """Every part that makes features with layers, embeddings included and, as far as the model keeps it apart, without
    what reads them."""
    holding = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and _holds_layers(part) and not type(part).__name__.endswith("Decoder")
    ]
    inside = {id(part): set(part.modules()) - {part} for part in holding}
    innermost = [part for part in holding if inside[id(part)].isdisjoint(holding)]
    encoders = []
    for encoder in innermost:
        around = [part for part in reversed(holding) if encoder in inside[id(part)]]
        for outer in around:  # the smallest first
            first = next(parameter for child in outer.children() for parameter in child.parameters())
            if any(first is parameter for parameter in encoder.parameters()):
                break  # nothing stands before the encoder: what stands behind it is a head
            if len(inside[id(outer)].intersection(innermost)) > 1:
                break
            encoder = outer
        encoders.append(encoder)
    return encoders


def _is_layer(module: nn.Module) -> bool:
    # What can be checkpointed is a layer: that holds for every encoder of transformers, whatever it calls its layers.
    kinds = [isinstance(part, GradientCheckpointingLayer) for part in module.modules()]
    return kinds[0] and not any(kinds[1:])


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """Layers, and each module outside them by itself, as they were registered: the order in which tokens pass them."""
    yield module
    if not _is_layer(module):
        for part in module.children():
            yield from _in_order(part)


def _holds_layers(module: nn.Module) -> bool:
    return not _is_layer(module) and any(map(_is_layer, module.modules()))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not re.search(r"(token|pos|position)[a-z_]*s?$", name)


class KeepRatioSchedule(TrainerCallback):
    """Changes the share of tokens kept while `transformers.Trainer` trains.

    `KeepRatioSchedule([(0, 1.0), (0.5, 0.25)])` trains densely for the first half of the steps and at a quarter of the
    tokens for the second; the other way round is as well. The ratio follows from the step alone, so that a resumed run
    goes on where it was.

    Args:
        milestones: (share of training, keep ratio from there on), in rising order, the first at 0.

    Raises:
        ValueError: the milestones are not in order, or outside 0 to 1.
    """

    def __init__(self, milestones: Sequence[tuple[float, float]]) -> None:
        starts = [start for start, _ in milestones]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(f"milestones must start at 0, 0 <= start < 1 in rising order, got {list(milestones)}")
        for _, ratio in milestones:
            if not 0 < ratio <= 1:
                raise ValueError(f"keep ratios must be above 0 and at most 1, got {ratio}")
        self.milestones = list(milestones)

    @classmethod
    def parse(cls, text: str) -> "KeepRatioSchedule":
        """From text such as "0:1,0.5:0.25".

        Raises:
            ValueError: the text is not of that form, or as in the constructor.
        """
        try:
            pairs = [tuple(map(float, part.split(":"))) for part in text.split(",")]
            return cls([(start, ratio) for start, ratio in pairs])
        except ValueError as error:
            raise ValueError(
                f"a schedule is START:RATIO,START:RATIO such as 0:1,0.5:0.25, got {text!r} ({error})"
            ) from error

    def ratio_at(self, progress: float) -> float:
        """Keep ratio after this share of training."""
        return [ratio for start, ratio in self.milestones if start <= progress][-1]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        set_keep_ratio(model, self.ratio_at(state.global_step / max(state.max_steps, 1)))
