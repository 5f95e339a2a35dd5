"""What layers must be told to run on merged tokens: how much each token weighs, and where it is.

Every strategy is one small frozen class that computes arguments of the layer from the merged sequence, once, when the
tokens are merged. They travel as *arguments* because gradient checkpointing runs a layer a second time, when everything
that surrounded the first run is gone.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling.reduction import Reduction
from ..modeling.size_weighted_attention import size_weighted_attention
from .call_state import CallStates
from .layer_call import LayerCall

_PREFIX = "ailurus_"
# Attention module -> sizes for the attention function that it calls next.
INNER_SIZES = CallStates("ailurus_inner_sizes")


@dataclass(frozen=True)
class MergedArguments:
    """Arguments that layers get while they run on merged tokens. This one gives none.

    Subclasses override `compute`, `check` where not every model can take the arguments, and `install` with `remove`
    where the model itself must be prepared.

    Attributes:
        each_layer: compute the arguments anew for every layer, from what it is given.
    """

    each_layer: ClassVar[bool] = False

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        """Arguments for all layers of a merged stretch, from the call of its first layer on the full sequence; or for
        one layer, from its own call."""
        return {}

    def check(self, layers: Iterable[nn.Module]) -> None:
        """Raise ValueError where the layers cannot take the arguments."""

    def install(self, layers: Iterable[nn.Module]) -> None:
        """Prepare the layers; called on every forward, so that later changes of the model are seen."""

    def remove(self, layers: Iterable[nn.Module]) -> None:
        """Undo `install`, except for hooks that are methods of this class: those are removed with the encoder's."""


@dataclass(frozen=True)
class KeyBias(MergedArguments):
    """Sizes as the keyword argument `ailurus_key_bias`, for layers that hand keyword arguments to the attention
    interface. Runs on eager, SDPA, flex and flash attention.

    While installed, the name of the model's attention function is prefixed with "ailurus_": the function of that name
    adds the sizes, and calls the original.
    """

    mask: str = "attention_mask"

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        _refuse_mask(call, self.mask)
        return {"ailurus_key_bias": merged.log_sizes}

    def install(self, layers: Iterable[nn.Module]) -> None:
        for config in _attention_configs(layers):
            name = config._attn_implementation
            if not name.startswith(_PREFIX) or name not in ALL_ATTENTION_FUNCTIONS:  # the latter in another process
                config._attn_implementation_internal = _register(name.removeprefix(_PREFIX))

    def remove(self, layers: Iterable[nn.Module]) -> None:
        for config in _attention_configs(layers):
            config._attn_implementation_internal = config._attn_implementation.removeprefix(_PREFIX)


@dataclass(frozen=True)
class RelativeKeyBias(KeyBias):
    """Sizes as `KeyBias` has them, for layers that add a bias between all pairs of tokens of the full sequence: the
    attention function takes the rows and columns of the tokens that are left, for each image its own.

    Masks given by the user are cut the same way.
    """

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        sizes_and_places = {"ailurus_key_bias": merged.log_sizes, "ailurus_kept": merged.kept_positions()}
        # The bias is made for the image's grid; interpolating, layers would resize it to the tokens they have.
        return {**sizes_and_places, "interpolate_pos_encoding": False}


@dataclass(frozen=True)
class MaskBias(MergedArguments):
    """Sizes as an additive float mask, for layers that hand nothing else to their attention.

    Only eager and SDPA attention add float masks.
    """

    argument: str = "attention_mask"

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        _refuse_mask(call, self.argument)
        return {self.argument: merged.log_sizes[:, None, None, :].to(call.args[0].dtype)}

    def check(self, layers: Iterable[nn.Module]) -> None:
        for config in _attention_configs(layers):
            if config._attn_implementation not in ("eager", "sdpa"):
                raise ValueError(
                    "this family takes the sizes of merged tokens as an additive mask, which needs attn_implementation "
                    f"'sdpa' or 'eager', got {config._attn_implementation!r}; call "
                    "model.set_attn_implementation('sdpa') first"
                )

    install = check


@dataclass(frozen=True)
class RotaryPositions(MergedArguments):
    """Rotary tables of the patch tokens, a pair of (N, head_dim), gathered for each image's representatives."""

    argument: str = "position_embeddings"

    def compute(self, call: LayerCall, merged: Reduction) -> dict[str, Any]:
        assert merged.of_patches is not None  # the tables have rows for patch tokens alone
        kept = merged.of_patches.kept_positions()
        return {self.argument: tuple(table[kept][:, None] for table in call.get(self.argument))}


def _refuse_mask(call: LayerCall, name: str) -> None:
    if call.get(name) is not None:
        raise ValueError(
            f"{name} must be None where tokens are merged, got a mask: images padded to one size, or several packed in "
            "one sequence, cannot be clustered; batch images of one size, or call remove_ailurus(model)"
        )


def _attention_configs(layers: Iterable[nn.Module]) -> Iterator[Any]:
    """Configurations that name the attention function of these layers, each once."""
    seen = set()
    for layer in layers:
        for module in layer.modules():
            config = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) is not None and id(config) not in seen:
                seen.add(id(config))
                yield config


def _register(implementation: str) -> str:
    """Register the attention function that weighs keys and otherwise is `implementation`; return its name."""
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            # Without it transformers would drop the user's padding masks in silence.
            AttentionMaskInterface.register(name, partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS[implementation]))
    return name


def _mask(function: Callable[..., Any], *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask function of the original; none where the user gave none, though flex attention would make one of N x N
    blocks that merged tokens do not fit."""
    return None if attention_mask is None else function(*args, attention_mask=attention_mask, **kwargs)


def _attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    ailurus_key_bias: Tensor | None = None,
    ailurus_kept: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function `implementation`, with keys weighed by (batch_size, num_tokens) logarithms of sizes, and
    the mask between pairs of tokens cut to those at `ailurus_kept` (batch_size, num_tokens)."""
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_function(module))
    if ailurus_key_bias is None:
        ailurus_key_bias = INNER_SIZES.take(module)
    if ailurus_key_bias is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if ailurus_kept is not None and attention_mask is not None:
        pairs = rows_and_columns(attention_mask, ailurus_kept) + ailurus_key_bias[:, None, None].to(query.dtype)
        return attention(module, query, key, value, pairs, **kwargs)
    # Layers that look at several windows at once have joined their sequences, and so are the sizes.
    sizes = ailurus_key_bias.reshape(key.shape[0], key.shape[2])
    return size_weighted_attention(attention, implementation, module, query, key, value, sizes, **kwargs)


def _eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention of the module's model. Unlike the others it has no name in the interface: every file of
    transformers that defines an attention module defines one."""
    files = (sys.modules[base.__module__] for base in type(module).__mro__)
    return next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)


def rows_and_columns(mask: Tensor, kept: Tensor) -> Tensor:
    """The rows and columns of the tokens that are left: (1 or B, num_heads, T, T) and their places (B, t) ->
    (B, num_heads, t, t)."""
    batch_size, num_kept = kept.shape
    # One gather of all pairs: half the time, or less, of one of rows and then one of columns.
    pairs = (kept[:, :, None] * mask.shape[3] + kept[:, None, :]).flatten(1)
    flat = mask.expand(batch_size, -1, -1, -1).flatten(2)
    return flat.gather(2, pairs[:, None].expand(-1, mask.shape[1], -1)).unflatten(2, (num_kept, num_kept))
