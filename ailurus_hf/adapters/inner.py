"""Sizes for layers that hand nothing on to their attention.

They travel as an argument of the layer that does reach the attention module, so that gradient checkpointing hands them
over again when it runs the layer a second time. A hook on the attention module takes them out of the argument, and the
attention function, which runs inside that module, picks them up.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.reduction import Reduction
from .arguments import INNER_SIZES, KeyBias, MergedArguments, rows_and_columns
from .call_state import CallStates
from .layer_call import LayerCall, positional_parameters


@dataclass(frozen=True)
class InnerKeyBias(KeyBias):
    """Sizes as a keyword argument that reaches the attention module, but that it does not know.

    Args:
        attention: path from a layer to the module that calls the attention function.
    """

    attention: str = ""

    def install(self, layers: Iterable[nn.Module]) -> None:
        layers = list(layers)
        super().install(layers)
        for layer in layers:
            _hook_once(layer.get_submodule(self.attention), self.take)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the attention module: keep the sizes for the attention function that it calls."""
        sizes = kwargs.pop("ailurus_key_bias", None)
        INNER_SIZES.set(module, sizes)
        return args, kwargs


@dataclass(frozen=True)
class InnerRotaryBias(InnerKeyBias):
    """Sizes as `KeyBias` has them, for layers that make rotary tables of the full grid themselves and give them to
    their attention module as its second argument, as SAM 3 does. The hook gathers them for the tokens that are left."""

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        return {**super().compute(call, merged), "ailurus_kept": merged.kept_positions()}

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = kwargs.pop("ailurus_kept", None)
        if kept is not None:
            args = (args[0], tuple(table.flatten(0, -2)[kept][:, None] for table in args[1]), *args[2:])
        return args, kwargs


@dataclass(frozen=True)
class PackedPositions(InnerKeyBias):
    """Positions and sizes together in the argument for the tokens' places in the full sequence, as V-JEPA 2 has it.

    Args:
        argument: its name, in the layer and in the attention module.
    """

    argument: str = "position_mask"

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        if call.get(self.argument) is not None:
            raise ValueError(
                f"{self.argument} must be None where tokens are merged: a subset of the patches has no grid"
            )
        sizes = merged.log_sizes.exp().round().long()
        return {self.argument: torch.stack([merged.kept_positions(), sizes], dim=1)}

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packed: Tensor | None = kwargs.get(self.argument)
        if packed is None or packed.ndim != 3:  # not ours: the layer runs on all tokens
            INNER_SIZES.set(module, None)
            return args, kwargs
        INNER_SIZES.set(module, packed[:, 1].float().log())
        return args, {**kwargs, self.argument: packed[:, 0]}


class PairBias(NamedTuple):
    """What an attention module that adds its own bias between all pairs of tokens must know of merged ones.

    Attributes:
        kept: (batch_size, num_tokens) int64, places in the full sequence.
        bias: (batch_size, 1, 1, num_tokens), what is added beside it.
    """

    kept: Tensor
    bias: Tensor


_KEPT = CallStates("ailurus_kept_positions")


@dataclass(frozen=True)
class InnerRelativeBias(MergedArguments):
    """Sizes and places in the layer's argument for a bias that all layers share, as data2vec has it. Hooks put the
    sizes there, and cut the bias that an attention module makes for the full grid to the tokens that are left.

    Args:
        attention: path from a layer to its attention module.
        table: path from there to the module that makes the bias, if the layer has one.
        argument: name of the argument.
    """

    # Encoders make the shared bias once for every layer; reentrant checkpointing goes back through each by itself.
    each_layer: ClassVar[bool] = True

    attention: str = "attention.attention"
    table: str = "relative_position_bias"
    argument: str = "relative_position_bias"

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        bias, kept = merged.log_sizes[:, None, None].to(call.args[0].dtype), merged.kept_positions()
        shared = call.get(self.argument)
        if shared is None:
            return {self.argument: PairBias(kept, bias)}
        return {self.argument: rows_and_columns(shared, kept) + bias}

    def install(self, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            module = layer.get_submodule(self.attention)
            if _hook_once(module, self.take) and getattr(module, self.table, None) is not None:
                module.get_submodule(self.table).register_forward_hook(self.cut)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the attention module: the sizes as the shared bias, the places for `cut`."""
        call = LayerCall(positional_parameters(module), args, kwargs)
        given = call.get(self.argument)
        pair = given if isinstance(given, PairBias) else None
        if getattr(module, self.table, None) is not None:
            _KEPT.set(module.get_submodule(self.table), None if pair is None else pair.kept)
        if pair is not None:
            call = call.replace({self.argument: pair.bias})
        return call.args, dict(call.kwargs)

    def cut(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook after the module that makes the bias."""
        kept = _KEPT.take(module)
        return output if kept is None else rows_and_columns(output, kept)


def _hook_once(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """Register a hook before the module, unless it has one of this file; whether it had none."""
    owners = [getattr(known, "__self__", None) for known in module._forward_pre_hooks.values()]
    if any(isinstance(owner, MergedArguments) for owner in owners):
        return False
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return True
