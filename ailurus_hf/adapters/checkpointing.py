"""Gradient checkpointing with the hooks of a layer outside the checkpoint, in versions of transformers without that.

Backward runs a checkpointed layer a second time, when what its hooks shared during the forward is gone. transformers
5.23 checkpoints `forward`, which hooks surround; before, it checkpointed the call, hooks included. There, the function
that checkpoints a layer is replaced while the model is adapted.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .arguments import announce_sizes, announced_sizes, forget_sizes

_HOOKS_ARE_INSIDE = "__call__" in vars(GradientCheckpointingLayer)
_FUNCTION = "_gradient_checkpointing_func"


@dataclass(frozen=True)
class _ForwardOnly:
    """Checkpoints the forward of a layer where it is given the call of the layer.

    Attributes:
        checkpoint: what the model's checkpointing set, (function, *arguments) -> output.
    """

    checkpoint: Callable[..., Any]

    def __call__(self, call: partial[Any], *args: Any) -> Any:
        layer = call.func.__self__  # type: ignore[attr-defined]  # transformers passes partial(layer.__call__, **kwargs)
        twin = copy.copy(layer)  # the same hooks, around another forward
        twin.forward = partial(self._forward, layer)
        return nn.Module.__call__(twin, *args, **call.keywords)

    def _forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sizes = announced_sizes(layer)

        def forward(*args: Any) -> Any:
            if sizes is None:
                return layer.forward(*args, **kwargs)
            announce_sizes(layer, sizes)
            try:
                return layer.forward(*args, **kwargs)
            finally:
                forget_sizes(layer)

        return self.checkpoint(forward, *args)


def keep_hooks_outside(layers: Iterable[nn.Module]) -> None:
    """Have checkpointed layers run their hooks once. Checkpointing may be enabled later: call it on every forward."""
    for layer in layers if _HOOKS_ARE_INSIDE else ():
        function = vars(layer).get(_FUNCTION)
        if function is not None and not isinstance(function, _ForwardOnly):
            setattr(layer, _FUNCTION, _ForwardOnly(function))


def put_hooks_back(layers: Iterable[nn.Module]) -> None:
    """Undo `keep_hooks_outside`."""
    for layer in layers:
        function = vars(layer).get(_FUNCTION)
        if isinstance(function, _ForwardOnly):
            setattr(layer, _FUNCTION, function.checkpoint)
