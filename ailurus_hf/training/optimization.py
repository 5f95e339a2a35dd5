"""Learning rates that fall towards the input, and budgets that change during training."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from ..budget import set_keep_ratio

__all__ = ["KeepRatioSchedule", "freeze_layers", "layerwise_parameter_groups"]


def layerwise_parameter_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with a smaller learning rate the closer a layer is to the input.

    With n encoder layers the head learns at `learning_rate`, layer l (from 0) at `learning_rate * layer_decay**(n - l)`
    and the embeddings at `learning_rate * layer_decay**(n + 1)` (BEiT, arXiv 2106.08254, appendix H). Biases, norms,
    tokens and positions have no weight decay.

    Args:
        model: a model with an encoder under its base model, such as any of this package; only parameters that require
            gradients are listed.
        learning_rate: of the head.
        weight_decay: of matrices and kernels.
        layer_decay: factor from one layer to the one before it, above 0 and at most 1.

    Raises:
        ValueError: `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    depth_of, depth = _depths(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[depth_of.get(id(parameter), depth), _decays(name, parameter)].append(parameter)
    return [
        {
            "params": groups[level, decays],
            "lr": learning_rate * layer_decay ** (depth - level),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for level, decays in sorted(groups)
    ]


def freeze_layers(model: PreTrainedModel, count: int) -> None:
    """Stop training the embeddings and the first `count` encoder layers; 0 trains everything.

    Nothing is computed for them in the backward pass, which saves the most where the first layers run on all tokens and
    the others on merged ones: with `count = config.cluster_layer` the backward pass ends where the tokens were merged.

    Raises:
        ValueError: `count` is negative or above the number of layers.
    """
    level_of, depth = _depths(model)
    if not 0 <= count < depth:
        raise ValueError(f"count must be from 0 to the number of layers {depth - 1}, got {count}")
    if count:
        for parameter in model.parameters():
            if level_of.get(id(parameter), depth) <= count:
                parameter.requires_grad_(False)


def _depths(model: PreTrainedModel) -> tuple[dict[int, int], int]:
    """Level of each encoder parameter: 0 before the first layer, 1 in it, ...; and the head's level."""
    encoder = model.base_model
    # What can be checkpointed is a layer: that holds for every encoder of transformers, whatever it calls its layers.
    layers = [module for module in encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    levels = {id(parameter): 0 for parameter in encoder.parameters()}
    for level, layer in enumerate(layers, start=1):
        levels |= {id(parameter): level for parameter in layer.parameters()}
    if encoder is model:
        return levels, len(layers) + 1
    # The encoder's last norm works on what the head gets, and learns like it.
    final = [parameter for name, parameter in encoder.named_parameters() if re.match(r"(layernorm|norm)\.", name)]
    return levels | {id(parameter): len(layers) + 1 for parameter in final}, len(layers) + 1


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not re.search(r"(token|position)[a-z_]*s?$", name)


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
