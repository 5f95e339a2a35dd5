"""The hooks that make one encoder adaptive.

A forward goes through them in this order: the patch embedding's hook opens a `CallState` with the grid; before the
first layer of a merged stretch the tokens are grouped and merged; before every layer of it the call gets the
arguments that go with merged tokens; after the last, the grid is unfolded; where the encoder hands out its hidden
states, those recorded inside the stretch are unfolded too, and the state is dropped.

Hooks are bound methods of the controller, so a copied model has a copied controller, and nothing is stored on the
model itself: the controller is found through its hooks.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.reduction import Reduction, ReductionContext, hints_of, merge_places, reduce_sequence
from ..modeling.settings import AdaptiveResolutionMixin, make_settings, overrides_of, with_overrides
from .arguments import MergedArguments
from .call_state import CallStates
from .families import FamilySpec
from .layer_call import LayerCall, positional_parameters

_STATES = CallStates("ailurus_adapters")
_WHOLE = CallStates("ailurus_whole_forwards")  # of the encoder itself, not of its parts one by one
_GRID = "_ailurus_grid"  # attribute of embeddings that were made outside such a forward
# Whose hooks work on whatever sequence a layer has; all others are to see the full one.
_INDIFFERENT = ("torch.", "transformers.", "accelerate.", "ailurus_hf.")
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass
class Stretch:
    """One stretch of layers that runs on merged tokens.

    Attributes:
        layers: their indices.
        inputs: hidden states before merging, (batch_size, T, hidden_size).
        reduction: what brings the full sequence back now; a method may merge more than once.
        arguments: what every layer of the stretch is given.
        by_layer: the reduction that each layer ran on whose output is merged.
        shown: where the output of the layer that ran last was unfolded for others to see: what they saw, its version,
            and the merged one.
    """

    layers: range
    inputs: Tensor
    reduction: Reduction
    arguments: dict[str, Any]
    by_layer: dict[int, Reduction] = field(default_factory=dict)
    shown: tuple[Tensor, int, Tensor] | None = None


@dataclass
class CallState:
    """What the hooks of one encoder share during one forward.

    Attributes:
        settings: the settings of this forward.
        grid: sizes of the grid's axes in patches.
        segments: the stretches of layers that are to run on merged tokens.
        order: see `FamilySpec.order`.
        tables: see `FamilySpec.tables`.
        previous: input of the layer that ran last, (batch_size, T, hidden_size).
        stretches: those that were merged so far.
        current: the one that is running.
    """

    settings: AdaptiveResolutionMixin
    grid: tuple[int, ...]
    segments: Sequence[range]
    order: Tensor | None = None
    tables: Tensor | None = None
    previous: Tensor | None = None
    stretches: list[Stretch] = field(default_factory=list)
    current: Stretch | None = None


class EncoderController:
    """Hooks of one encoder.

    Args:
        owner: the encoder.
        spec: its row in the table.
        config: configuration of the model the user adapted; its entry `ailurus` holds the settings, and is read on
            every forward.

    Raises:
        ValueError: the encoder does not have the modules that the row names, or its layers cannot learn sizes.
    """

    def __init__(self, owner: nn.Module, spec: FamilySpec, config: Any):
        self.owner, self.spec, self.config = owner, spec, config
        self.layers = list(self._find(spec.layers))
        self.grids: set[tuple[int, ...]] = set()  # of embeddings made outside a forward of the whole encoder
        self.patches, self.taps = self._find(*spec.patches), self._find(spec.taps)
        spec.bias.check(self.layers)
        self.parameters = positional_parameters(self.layers[0])
        self._given: dict[str, Any] = {}
        self._settings = make_settings({})

    def __deepcopy__(self, memo: dict[int, Any]) -> "EncoderController":
        """A copy for a copy of the encoder. A copied part of the encoder, as PEFT makes them, keeps this one."""
        if id(self.owner) not in memo:
            return self
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _find(self, *paths: str) -> Any:
        for path in paths:
            try:
                return self.owner.get_submodule(path)
            except AttributeError:
                continue
        raise ValueError(
            f"{type(self.owner).__name__} has no module {' or '.join(map(repr, paths))}, which the row of family "
            f"{self.spec.family!r} names; pass a row that fits as family=FamilySpec(...)"
        )

    @property
    def settings(self) -> AdaptiveResolutionMixin:
        """The settings of a forward that begins here: `config.ailurus`, under those of the contexts around it.

        Raises:
            ValueError: one of them is out of range, of the wrong type or unknown.
        """
        # Removing the hooks of another model that shares the configuration takes the entry away.
        given = getattr(self.config, "ailurus", self._given)
        if torch.compiler.is_compiling():
            stored = make_settings(given)
        else:
            if given != self._given:  # checked once, not on every forward
                self._settings, self._given = make_settings(given), dict(given)
            stored = self._settings
        return with_overrides(stored, overrides_of(self.config))

    def segments(self, settings: AdaptiveResolutionMixin) -> Sequence[range]:
        """Stretches of layers that run on merged tokens under these settings.

        Raises:
            ValueError: the settings leave no layer to run on merged tokens.
        """
        return self.spec.segments(settings, len(self.layers), getattr(self.owner, "config", None))

    def install(self) -> None:
        """Register the hooks."""
        self._settings, self._given = make_settings(self.config.ailurus), dict(self.config.ailurus)
        self._hook_all()

    def _hook_all(self) -> None:
        self.register_hooks()
        self.owner.register_forward_pre_hook(self.enter)
        self.owner.register_forward_hook(self.drop_states, always_call=True)

    def register_hooks(self) -> None:
        """The part of `install` that other kinds of layers do otherwise."""
        self._prepare_layers()
        self.patches.register_forward_pre_hook(self.check_pixels)
        self.patches.register_forward_hook(self.open_call)
        self._embeddings().register_forward_hook(self.mark_embeddings)
        if self.spec.order is not None:
            self._find(self.spec.order[0]).register_forward_hook(self.note_order)
        if self.spec.tables and self.spec.tables in dict(self.owner.named_modules()):
            self._find(self.spec.tables).register_forward_hook(self.take_tables)
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self.before_layer, index), with_kwargs=True)
            # In front of the hooks that record hidden states, whenever those are installed.
            layer.register_forward_hook(partial(self.after_layer, index), prepend=True)
        if self.spec.fixed:
            self.taps.register_forward_pre_hook(self.fix_arguments, with_kwargs=True)
        self.taps.register_forward_hook(self.close_call, prepend=True)

    def remove(self) -> None:
        """Remove the hooks, and whatever else `install` changed."""
        for module in {*self.owner.modules(), *(part for layer in self.layers for part in layer.modules())}:
            for key in [key for key, hook in _hooks(module) if self._is_mine(_owner_of(hook))]:
                for table in _HOOK_TABLES:
                    getattr(module, table).pop(key, None)
        self.spec.bias.remove(self.layers)
        self.spec.positions.remove(self.layers)

    def _is_mine(self, owner: Any) -> bool:
        return owner is self or isinstance(owner, MergedArguments)

    def _prepare_layers(self) -> None:
        """What later changes of the model may undo, so it is done on every forward."""
        self.spec.bias.install(self.layers)
        self.spec.positions.install(self.layers)

    def _embeddings(self) -> nn.Module:
        """The largest module that the patch embedding is in and the layers are not."""
        inside = [(name, module) for name, module in self.owner.named_modules() if self.patches in module.modules()]
        return next(module for name, module in inside if name and not f"{self.spec.layers}.".startswith(f"{name}."))

    def _follow_layers(self) -> None:
        """Move the hooks where layers were taken away, added or replaced. One that was wrapped keeps them."""
        known = set(self.layers)
        found = self._find(self.spec.layers)
        layers = [next((part for part in layer.modules() if part in known), layer) for layer in found]
        if layers != self.layers:
            self.remove()
            self.layers = layers
            self._hook_all()  # the settings stay: their entry in the configuration may be gone, see `settings`

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook before the encoder."""
        _WHOLE.set(self, True)

    def check_pixels(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook before the patch embedding: refuse images that hold no patch."""
        if isinstance(module, nn.Conv2d | nn.Conv3d) and isinstance(args[0], Tensor):
            axes = args[0].shape[2:]
            if any(size < patch for size, patch in zip(axes, module.kernel_size, strict=False)):
                raise ValueError(
                    f"pixel_values must be at least one patch of {module.kernel_size} pixels, got {tuple(axes)}; "
                    "resize the images"
                )

    def open_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the patch embedding: a forward begins."""
        if not torch.compiler.is_compiling():
            self._follow_layers()
        self._prepare_layers()
        _STATES.set(self, self._new_state(self.spec.grid(output, getattr(self.owner, "config", None))))

    def _new_state(self, grid: tuple[int, ...]) -> CallState:
        settings = self.settings
        # Nothing to merge, nothing to refuse: masked images, which have no grid, run as they do in the plain model.
        return CallState(settings, grid, () if _keeps_all(settings) else self.segments(settings))

    def mark_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the embeddings: those made by themselves may wait while others are made, so they carry a grid."""
        if torch.compiler.is_compiling() or _WHOLE.get(self):
            return
        grid = self._state().grid
        self.grids.add(grid)
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor):
                setattr(part, _GRID, grid)

    def _state_of_stored(self, embeddings: Tensor) -> CallState:
        """The state of a forward that begins with the layers, on embeddings made before."""
        if _keeps_all(self.settings):
            return self._new_state(())
        grid, latest = getattr(embeddings, _GRID, None), _STATES.get(self)
        if grid is None and len(self.grids) == 1:
            (grid,) = self.grids
        if grid is None or self.spec.order is not None:
            raise RuntimeError(
                f"the layers of {type(self.owner).__name__} run on embeddings whose grid is not known: they were made "
                "outside a forward of the whole model and changed since, and so were others of another size, or they "
                "are not in the grid's order; call the whole model on pixel_values, or set keep_ratio to 1"
            )
        state = self._new_state(grid)
        state.tables = None if latest is None else latest.tables
        return state

    def fix_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the module at `taps`: see `FamilySpec.fixed`."""
        call = LayerCall(positional_parameters(module), args, kwargs).replace(self.spec.fixed)
        return call.args, dict(call.kwargs)

    def note_order(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after a module that shuffled the tokens."""
        assert self.spec.order is not None
        self._state().order = output[self.spec.order[1]]

    def take_tables(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[Tensor, ...]:
        """Hook after a module that makes a table to add after each layer but the last: inside a stretch, where the
        sequence is shorter, nothing is added there, and the hook before the next layer does it."""
        state = self._state()
        state.tables = output
        inside = {place for segment in state.segments for place in segment[:-1]}
        return tuple(table.new_zeros(()) if place in inside else table for place, table in enumerate(output))

    def before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook before each layer: merge where a stretch begins, and hand over what goes with merged tokens."""
        if index == 0 and not _WHOLE.get(self):
            _STATES.set(self, self._state_of_stored(args[0]))
        state = self._state()
        call = LayerCall(self.parameters, args, kwargs)
        if state.current is not None and state.current.shown is not None:
            call = call._replace(args=(_merged_again(state.current, call.args[0]), *call.args[1:]))
        for segment in state.segments:
            if segment.start < index < segment.stop and state.tables is not None:
                call = call._replace(args=(_add_table(state, index - 1, call.args[0]), *call.args[1:]))
            # Compared one by one: torch.compile cannot look for a layer's number in a range where it traces numbers.
            if any(index == place for place in merge_places(state.settings, segment)):
                call = self._merge(state, segment, index, call)
        state.previous = call.args[0]
        stretch = state.current
        if stretch is not None:
            stretch.shown = None
            arguments = stretch.arguments
            if self.spec.bias.each_layer:
                arguments = arguments | self.spec.bias.compute(call, stretch.reduction)
            stretch.by_layer[index] = stretch.reduction
            call = call.replace(arguments)
        return call.args, dict(call.kwargs)

    def _merge(self, state: CallState, segment: range, index: int, call: LayerCall) -> LayerCall:
        if call.get("cu_seqlens") is not None:
            raise ValueError(
                "images of different sizes packed in one sequence have no common grid to cluster on: batch images of "
                "one size, or call remove_ailurus(model)"
            )
        inputs = call.args[0].flatten(1, 2) if self.spec.maps else call.args[0]
        reduction = self._reduce(state, index, inputs)
        if reduction is None:
            return call
        arguments = self.spec.positions.compute(call, reduction)
        if not self.spec.bias.each_layer:
            arguments |= self.spec.bias.compute(call, reduction)
        if state.current is None:
            state.current = Stretch(segment, inputs, reduction, arguments)
            state.stretches.append(state.current)
        else:
            state.current.reduction, state.current.arguments = reduction, arguments
        tokens = reduction.tokens[:, None] if self.spec.maps else reduction.tokens
        return call._replace(args=(tokens, *call.args[1:]))

    def _reduce(self, state: CallState, index: int, inputs: Tensor) -> Reduction | None:
        """Reduce the sequence before a layer; what precedes the patches is what is left of its length."""
        num_suffix = getattr(self.owner.config, self.spec.suffix) if self.spec.suffix else 0
        before = None if state.current is None else state.current.reduction.of_patches
        num_patches = math.prod(state.grid) if before is None else before.tokens.shape[1]
        num_prefix, previous = inputs.shape[1] - num_patches - num_suffix, state.previous
        if num_prefix < 0:
            raise ValueError(
                f"the sequence must hold a token for every patch of the grid {state.grid} and {num_suffix} behind "
                f"them, got {inputs.shape[1]} tokens: a subset of the patches, or several images packed in one "
                "sequence, has no grid to cluster on; run the model on whole images, or call remove_ailurus(model)"
            )
        context = ReductionContext(
            norm=self.spec.norm_of(self.layers[index]),
            previous=None if previous is None else lambda: previous[:, num_prefix : num_prefix + num_patches],
            reduction=before,
            **hints_of(self.config),
        )
        return reduce_sequence(
            inputs,
            state.grid,
            state.settings.num_groups(math.prod(state.grid), index),
            state.settings,
            context,
            num_prefix=num_prefix,
            num_suffix=num_suffix,
            order=state.order,
        )

    def after_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook after each layer: unfold where a stretch ends, and where somebody looks at what comes out before."""
        state = self._state()
        stretch = state.current
        if stretch is None:
            return None
        merged = output[0] if isinstance(output, tuple) else output
        if index == stretch.layers.stop - 1:
            state.current = None
            full = self._unfold(merged, state, stretch)
        elif self._is_watched(layer) and stretch.reduction.merge is not None:
            full = self._unfold(merged, state, stretch)
            stretch.shown = (full, full._version, merged)
            del stretch.by_layer[index]
        else:
            return None
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _is_watched(self, layer: nn.Module) -> bool:
        """Whether others than those that work on any sequence see the output of a layer."""
        if torch.compiler.is_compiling():
            return False
        hooks = [*layer._forward_hooks.values(), *layer._backward_hooks.values()]
        modules = [getattr(getattr(hook, "func", hook), "__module__", None) or "" for hook in hooks]
        return not _WHOLE.get(self) or any(not module.startswith(_INDIFFERENT) for module in modules)

    def running_spread(self) -> Callable[[Tensor], Tensor] | None:
        """What copies merged tokens to the full sequence, while a layer of this encoder runs on merged ones."""
        state: CallState | None = _STATES.get(self)
        return None if state is None or state.current is None else state.current.reduction.spread

    def _unfold(self, output: Tensor, state: CallState, stretch: Stretch) -> Tensor:
        if self.spec.maps:
            return stretch.reduction.restore(output[:, 0]).unflatten(1, state.grid)
        return stretch.reduction.restore(output)

    def close_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook where the encoder hands out its hidden states: unfold those of merged layers; the forward ends."""
        state = self._state()
        stretches = state.stretches
        _STATES.clear(self)
        if state.current is not None:
            raise RuntimeError(
                f"{type(self.owner).__name__} ended with its tokens merged: layer {state.current.layers.stop - 1}, "
                "where they unfold, did not run; raise tail_layers, so that merging ends where the model does"
            )
        if not stretches:
            return None
        if isinstance(output, tuple):
            return tuple(self._unfold_recorded(part, stretches) for part in output)
        for name, part in output.items():
            if isinstance(part, tuple):
                output[name] = self._unfold_recorded(part, stretches)
        return None

    def drop_states(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook after the encoder, also after an exception in it: what the forward left would keep the model alive."""
        _STATES.clear(self)
        _WHOLE.clear(self)

    def _unfold_recorded(self, recorded: Any, stretches: list[Stretch]) -> Any:
        """Unfold a tuple of hidden states, one for the first layer's input and one per layer; leave all else alone."""
        if not isinstance(recorded, tuple):
            return recorded
        _refuse_attentions(recorded, stretches)
        if len(recorded) != len(self.layers) + 1:
            return recorded
        states = list(recorded)
        for stretch in stretches:
            for index in stretch.layers[:-1]:
                if states[index + 1] is not None and index in stretch.by_layer:
                    states[index + 1] = stretch.by_layer[index].restore(states[index + 1])
            if stretch.layers.start == 0 and states[0] is not None:
                states[0] = stretch.inputs
        return tuple(states)

    def _state(self) -> CallState:
        state: CallState | None = _STATES.get(self)
        if state is None and _keeps_all(self.settings):
            return self._new_state(())
        if state is None:
            raise RuntimeError(
                f"the layers of {type(self.owner).__name__} ran without its patch embedding, so the grid of the tokens "
                "is not known: call the whole model on pixel_values, and compile it as a whole"
            )
        return state


def _keeps_all(settings: AdaptiveResolutionMixin) -> bool:
    return settings.keep_ratio == 1 and settings.num_clusters is None


def _merged_again(stretch: Stretch, sequence: Tensor) -> Tensor:
    """The input of a layer after one whose output was unfolded: the merged tokens that it stood for, to the bit, unless
    somebody changed it. Gradients go through what was shown, so that those who look at it see them."""
    assert stretch.shown is not None
    assert stretch.reduction.merge is not None
    full, version, merged = stretch.shown
    again = stretch.reduction.merge(sequence)
    if sequence is not full or full._version != version:
        return again
    return merged.detach() + (again - again.detach()) if again.requires_grad else merged


def _add_table(state: CallState, index: int, sequence: Tensor) -> Tensor:
    """Add the table of the layer before, its rows those of the tokens that are left."""
    assert state.tables is not None
    table = state.tables[index].to(sequence.device)
    if state.current is not None:
        kept = state.current.reduction.kept_positions()[..., None]
        table = table.expand(kept.shape[0], -1, -1).gather(1, kept.expand(-1, -1, table.shape[-1]))
    return sequence + table


def controllers_of(model: nn.Module) -> list[EncoderController]:
    """The controllers of all adapted encoders in a model, found through their hooks."""
    owners = [_owner_of(hook) for module in model.modules() for _, hook in _hooks(module)]
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, EncoderController)))


def _hooks(module: nn.Module) -> Iterator[tuple[int, Any]]:
    yield from module._forward_hooks.items()
    yield from module._forward_pre_hooks.items()


def _owner_of(hook: Any) -> Any:
    """The object whose method a hook is, or None."""
    return getattr(getattr(hook, "func", hook), "__self__", None)


def _refuse_attentions(recorded: tuple[Any, ...], stretches: list[Stretch]) -> None:
    lengths = {
        part.tokens.shape[1] for stretch in stretches for part in (*stretch.by_layer.values(), stretch.reduction)
    }
    merged = [(length, length) for length in lengths]  # sides of weights, which square feature maps do not have
    if any(isinstance(part, Tensor) and part.ndim == 4 and part.shape[-2:] in merged for part in recorded):
        raise ValueError(
            "output_attentions=True is not possible where tokens are merged: the weights of those layers are between "
            "merged tokens; set model.config.ailurus['keep_ratio'] = 1, or call remove_ailurus(model)"
        )
