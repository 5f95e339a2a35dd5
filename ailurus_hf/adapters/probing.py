"""Finding the row of an encoder that the table of families lacks."""

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.reduction import Grouping, Reduction, reduce_to_groups, registered
from ..modeling.token_groups import group_tokens
from .arguments import KeyBias, MaskBias, MergedArguments, RotaryPositions
from .controller import EncoderController, controllers_of
from .families import FamilySpec

_BIASES: tuple[MergedArguments, ...] = (KeyBias(), MaskBias())
_POSITIONS: tuple[MergedArguments, ...] = (MergedArguments(), RotaryPositions())
_PERMUTATION = "the order of the tokens, for ailurus_hf.adapters.probe"
_TOLERANCE = 1e-4  # of an output's largest value


@dataclass(frozen=True)
class _Withheld(MergedArguments):
    """Another way of telling sizes that tells none: what the outputs are when they do not arrive."""

    bias: MergedArguments

    def compute(self, call: Any, merged: Any) -> dict[str, Any]:
        return {name: torch.zeros_like(value) for name, value in self.bias.compute(call, merged).items()}

    def install(self, layers: Any) -> None:
        self.bias.install(layers)

    def remove(self, layers: Any) -> None:
        self.bias.remove(layers)


@torch.no_grad()
def probe(model: PreTrainedModel, pixel_values: Tensor, **inputs: Any) -> FamilySpec:
    """Find, test and print the row of a vision encoder that the table of families lacks.

    Every list of layers in the model, every convolution that could make its patches and every way of telling layers
    about merged tokens is tried on these inputs. A row is right when the outputs stay the same after the tokens were
    put in another order, keep their shapes with a quarter of the tokens, and change when the sizes are withheld. The
    model is left as it was.

    Args:
        model: a model of transformers that is not adapted.
        pixel_values: images to try it on, of a usual size, (batch_size, 3, height, width).
        inputs: whatever else the model needs.

    Returns:
        The row, for `apply_ailurus(model, family=row)`. It is printed too, ready to paste.

    Raises:
        ValueError: no row fits, or the model is adapted already.
    """
    if controllers_of(model):
        raise ValueError("model must not be adapted: call remove_ailurus(model) first")
    inputs = {"pixel_values": pixel_values, **inputs}
    if "output_hidden_states" in inspect.signature(model.forward).parameters or _takes_kwargs(model):
        inputs["output_hidden_states"] = True
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        plain, tried = _tensors(model(**inputs)), 0
        for owner, spec in _candidates(model):
            tried += 1
            if _fits(model, owner, spec, inputs, plain):
                print(_as_code(spec))
                return spec
    finally:
        for module, mode in training.items():
            module.training = mode
    raise ValueError(
        f"no row fits {type(model).__name__}: {tried} were tried. Its tokens change in number between the layers, its "
        "attention takes neither sizes nor a mask, or it runs in windows; ailurus_hf/adapters/families.py says more"
    )


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, FamilySpec]]:
    """All rows that could fit: encoders from the inside out, lists of layers, convolutions, arguments."""
    owners = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for owner in reversed(owners):
        convolutions = [name for name, module in owner.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
        for (layers, taps), patches, bias, positions in itertools.product(
            _layer_lists(owner), convolutions[:3], _BIASES, _POSITIONS
        ):
            name = type(owner).__name__
            family = str(getattr(owner.config, "model_type", name.lower()))
            yield (
                owner,
                FamilySpec(family, (name,), layers, (patches,), taps, bias=bias, positions=positions),
            )


def _layer_lists(owner: nn.Module) -> list[tuple[str, str]]:
    """Lists of three or more layers of one class, and the modules that may hand out their hidden states."""
    found = []
    for name, module in owner.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= 3 and len({type(layer) for layer in module}) == 1:
            parent = name.rpartition(".")[0]
            holds_states = isinstance(owner.get_submodule(parent), PreTrainedModel)
            found.append((name, parent if holds_states else ""))
    return found


def _fits(
    model: nn.Module, owner: nn.Module, spec: FamilySpec, inputs: dict[str, Any], plain: dict[str, Tensor]
) -> bool:
    try:
        with registered(_PERMUTATION, Grouping(reduce=_permutation)):
            permuted = _run(model, owner, spec, inputs, _PERMUTATION)
        merged = _run(model, owner, spec, inputs)
        withheld = FamilySpec(**{**vars(spec), "bias": _Withheld(spec.bias)})
        unweighted = _run(model, owner, withheld, inputs)
    except Exception:  # whatever a wrong row brings about in somebody else's model
        return False
    shapes = {name: value.shape for name, value in plain.items()}
    if any({name: value.shape for name, value in found.items()} != shapes for found in (permuted, merged)):
        return False
    same = all(_close(permuted[name], value) for name, value in plain.items())
    return same and _differ(merged, plain) and _differ(merged, unweighted)


def _run(
    model: nn.Module, owner: nn.Module, spec: FamilySpec, inputs: dict[str, Any], grouping: str = "density_peaks"
) -> dict[str, Tensor]:
    settings = {"keep_ratio": 0.25, "cluster_layer": 1, "grouping": grouping}
    controller = EncoderController(owner, spec, SimpleNamespace(ailurus=settings))
    controller.install()
    try:
        return _tensors(model(**inputs))
    finally:
        controller.remove()


def _permutation(tokens: Tensor, *_: Any) -> Reduction:
    """As many groups as tokens, in another order."""
    num_tokens = tokens.shape[1]
    order = torch.arange(num_tokens - 1, -1, -1, device=tokens.device)
    return reduce_to_groups(tokens, group_tokens(order.expand(tokens.shape[0], -1), num_tokens))


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of a model's output, by name."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    return {key: tensor for part, item in items for key, tensor in _tensors(item, f"{name}.{part}").items()}


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return bool((found == expected).all())
    scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
    return expected.numel() == 0 or float((found - expected).abs().max()) <= _TOLERANCE * scale


def _differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


def _takes_kwargs(model: nn.Module) -> bool:
    return any(item.kind is item.VAR_KEYWORD for item in inspect.signature(model.forward).parameters.values())


def _as_code(spec: FamilySpec) -> str:
    """The row as one would write it."""
    parts = [repr(spec.family), repr(spec.owners), repr(spec.layers), repr(spec.patches)]
    parts += [f"taps={spec.taps!r}"] if spec.taps else []
    parts += [f"bias={type(spec.bias).__name__}()"] if not isinstance(spec.bias, KeyBias) else []
    parts += [f"positions={type(spec.positions).__name__}()"] if type(spec.positions) is not MergedArguments else []
    return f"FamilySpec({', '.join(parts)})"
