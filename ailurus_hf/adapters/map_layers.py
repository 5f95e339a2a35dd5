"""Encoders on maps, whose windows need the whole grid: tokens are merged inside each layer with global attention.

Such layers take nothing but a map (batch_size, height, width, hidden_size), their attention makes its relative
positions from the map's sides, and a convolution may follow on the grid. So nothing can be handed to them, and merging
goes around their two branches instead: each runs on the merged tokens, and what it adds is unfolded. With x the map,
m(x) the means of the groups and u the unfolding, u(m(x) + branch) + x - u(m(x)) = x + u(branch): the result is that of
a whole layer on merged tokens with its residual added back.

Everything happens inside the layer, grouping included, so gradient checkpointing does it again by itself.

The attention module is the one thing that cannot run on merged tokens. A hook can change what a module takes and gives
but not stop it from running, and what replaces its `forward` gets lost where accelerate replaces it too; so the module
runs on a single token, which costs next to nothing, and the hook behind it puts the right result in the place of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.reduction import Reduction, ReductionContext, hints_of, reduce
from ..modeling.settings import AdaptiveResolutionMixin, with_overrides
from .call_state import CallStates
from .controller import EncoderController
from .families import MapLayer

_STATES = CallStates("ailurus_map_layers")


@dataclass
class _LayerState:
    """What the hooks of one layer share.

    Attributes:
        reduction: what brings the grid back.
        grid: its height and width in tokens.
        tokens: input of the attention, (batch_size, M, hidden_size).
        copied: what to add where the grid is to hold copies of the merged tokens, (batch_size, N, hidden_size).
    """

    reduction: Reduction
    grid: tuple[int, int]
    tokens: Tensor | None = None
    copied: Tensor | None = None


class MapController(EncoderController):
    """Hooks of one encoder whose row says `map_layer`; see the description of this file."""

    _latest: AdaptiveResolutionMixin

    def register_hooks(self) -> None:
        self.patches.register_forward_pre_hook(self.check_pixels)
        self.patches.register_forward_hook(self.open_call)
        self.taps.register_forward_hook(self.refuse_attentions, prepend=True)
        for index, layer in enumerate(self.layers):
            part = partial(self._part, layer)
            part("norm1").register_forward_pre_hook(partial(self.merge, index))
            part("attention").register_forward_pre_hook(partial(self.withhold_tokens, index), with_kwargs=True)
            # Behind the hooks of others they would see the output of one token.
            part("attention").register_forward_hook(partial(self.attend, index), prepend=True)
            part("norm2").register_forward_pre_hook(partial(self.merge_again, index))
            part("mlp").register_forward_hook(partial(self.unfold, index), prepend=True)

    def _part(self, layer: nn.Module, name: str) -> nn.Module:
        return layer.get_submodule(getattr(self._names, name))

    @property
    def _names(self) -> MapLayer:
        assert self.spec.map_layer is not None
        return self.spec.map_layer

    def _layer_state(self, index: int) -> _LayerState | None:
        state: _LayerState | None = _STATES.get(self.layers[index])
        return state

    def open_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the patch embedding: read the settings of this forward."""
        if not torch.compiler.is_compiling():
            self._follow_layers()
        self._latest = self.settings
        _STATES.set(self, self._latest)

    def drop_states(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        super().drop_states(module, args, output)
        for key in (self, *self.layers):
            _STATES.clear(key)

    def running_spread(self) -> Callable[[Tensor], Tensor] | None:
        states = [self._layer_state(index) for index in range(len(self.layers))]
        return next((state.reduction.spread for state in states if state is not None), None)

    def _current(self) -> AdaptiveResolutionMixin:
        """The settings of this forward. Where gradient checkpointing runs a layer again that forward is over: there it
        is those of the latest one, though others may be set by now."""
        current: AdaptiveResolutionMixin = _STATES.get(self) or self._latest
        return current

    def merge(self, index: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hook before the first norm: the layer begins; group the map's tokens and go on with the means."""
        _STATES.clear(self.layers[index])
        settings = self._current()
        if not any(index in segment for segment in self.segments(settings)):
            return None
        tokens, grid = args[0].flatten(1, 2), (args[0].shape[1], args[0].shape[2])
        context = ReductionContext(norm=module, **hints_of(self.config))
        # The residual is in the map itself, so that none is needed to come back.
        copying = with_overrides(settings, {"unfold": "copy"})
        reduction = reduce(tokens, grid, settings.num_groups(tokens.shape[1], index), copying, context)
        if reduction is None:
            return None
        if reduction.merge is None:
            raise ValueError(
                f"grouping {settings.grouping!r} has no merge, which {type(self.layers[index]).__name__} needs after "
                "its attention; choose another grouping"
            )
        _STATES.set(self.layers[index], _LayerState(reduction, grid))
        return (reduction.tokens[:, None],)

    def withhold_tokens(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the attention module: it gets one token, since it knows nothing of merged ones."""
        state = self._layer_state(index)
        if state is None:
            return None
        if args:
            state.tokens = args[0][:, 0]
            return (args[0][:, :, :1], *args[1:]), kwargs
        (name,) = (name for name, value in kwargs.items() if isinstance(value, Tensor))
        state.tokens = kwargs[name][:, 0]
        return args, {**kwargs, name: kwargs[name][:, :, :1]}

    def attend(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook after the attention module: attention between the merged tokens in place of what it made of one."""
        state = self._layer_state(index)
        if state is None:
            return None
        assert state.tokens is not None
        num_heads = getattr(module, self._names.num_heads)
        tokens = attention_on_merged(module, state.tokens, state.reduction, state.grid, num_heads)
        state.tokens = None
        return (self._on_grid(tokens, state), *output[1:])

    def merge_again(self, index: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hook before the second norm: the same groups of the map that the attention was added to."""
        state = self._layer_state(index)
        if state is None:
            return None
        tokens = args[0].flatten(1, 2)
        assert state.reduction.merge is not None
        merged = state.reduction.merge(tokens)
        if self._current().unfold == "copy":
            state.copied = state.reduction.restore(merged) - tokens
        return (merged[:, None],)

    def unfold(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook after the feed-forward network: unfold what it adds to the map; the layer ends."""
        state = self._layer_state(index)
        if state is None:
            return None
        _STATES.clear(self.layers[index])
        grid = self._on_grid(output[:, 0], state)
        return grid if state.copied is None else grid + state.copied.unflatten(1, state.grid)

    def _on_grid(self, tokens: Tensor, state: _LayerState) -> Tensor:
        return state.reduction.restore(tokens).unflatten(1, state.grid)

    def refuse_attentions(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook where the encoder hands out attention weights: those of one token are none."""
        for part in output.values() if isinstance(output, dict) else output:
            if isinstance(part, tuple) and any(isinstance(item, Tensor) and item.shape[-2:] == (1, 1) for item in part):
                raise ValueError(
                    "output_attentions=True is not possible where tokens are merged: the weights of those layers are "
                    "between merged tokens; set model.config.ailurus['keep_ratio'] = 1, or call remove_ailurus(model)"
                )


def attention_on_merged(
    attention: Any, tokens: Tensor, reduction: Reduction, grid: tuple[int, int], num_heads: int
) -> Tensor:
    """Attention with decomposed relative positions (MViTv2, section 4.1), between tokens that stand for several.

    Each merged token is at its representative's place on the grid, and counts as often as it has members.

    Args:
        attention: module with the linear layers `qkv` and `proj`, and `scale`; with `rel_pos_h` and `rel_pos_w`, each
            (2 * size - 1, head_dim), where it has relative positions.
        tokens: (batch_size, M, hidden_size).
        reduction: what made them of the tokens of the grid.
        grid: height and width of the full grid.
        num_heads: number of attention heads.

    Returns:
        (batch_size, M, hidden_size).

    Raises:
        ValueError: the module's tables are offloaded.
    """
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = reduction.log_sizes[:, None, None].to(query.dtype)
    if hasattr(attention, "rel_pos_h"):
        places = reduction.kept_positions()
        rows, columns = places.div(grid[1], rounding_mode="floor"), places.remainder(grid[1])
        tables = (attention.rel_pos_h, rows, grid[0]), (attention.rel_pos_w, columns, grid[1])
        to_lines = torch.cat([relative_positions(query, *axis) for axis in tables], dim=-1)
        # Every key picks its row and its column: as a product with zeros and ones, many times faster than indexing.
        lines = torch.cat([F.one_hot(rows, grid[0]), F.one_hot(columns, grid[1])], dim=-1).to(query.dtype)
        bias = to_lines @ lines.transpose(1, 2)[:, None] + bias
    dropout = getattr(attention, "dropout", 0.0) if attention.training else 0.0
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale
    )
    return attention.proj(attended.transpose(1, 2).flatten(2))


def relative_positions(query: Tensor, table: Tensor, places: Tensor, size: int) -> Tensor:
    """What relative positions along one axis add to a token's attention to each line of the grid across it.

    Args:
        query: (batch_size, num_heads, M, head_dim).
        table: (L, head_dim), a vector per distance; resized to the 2 * size - 1 distances of the axis.
        places: (batch_size, M) int64, place of every token on the axis.
        size: length of the axis.

    Returns:
        (batch_size, num_heads, M, size), entry (i, k) the product of query i with the vector of distance
        `places[i] - k`.

    Raises:
        ValueError: the table is offloaded.
    """
    if table.is_meta:
        raise ValueError(
            "the tables of relative positions are offloaded while tokens are merged: keep the vision encoder on a "
            "device in device_map, or call remove_ailurus(model)"
        )
    num_distances = 2 * size - 1
    if table.shape[0] != num_distances:
        table = F.interpolate(table.t()[None], size=num_distances, mode="linear")[0].t()
    distances = places[..., None] - torch.arange(size, device=places.device) + size - 1
    return torch.einsum("bhmc,bmkc->bhmk", query, table[distances])
