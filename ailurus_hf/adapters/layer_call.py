"""The call of one layer, its arguments found by name wherever the caller put them."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class LayerCall(NamedTuple):
    """Arguments of a layer's call.

    Attributes:
        parameters: names of the layer's positional parameters, in order; the first are the hidden states.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    parameters: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """The argument of that name, or None."""
        place = self._place(name)
        return self.kwargs.get(name) if place is None else self.args[place]

    def replace(self, arguments: Mapping[str, Any]) -> "LayerCall":
        """The same call with other values for these arguments; arguments the layer did not get yet are added."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in arguments.items():
            place = self._place(name)
            if place is None:
                kwargs[name] = value
            else:
                args[place] = value
        return LayerCall(self.parameters, tuple(args), kwargs)

    def _place(self, name: str) -> int | None:
        passed = self.parameters[: len(self.args)]
        return passed.index(name) if name in passed else None


def positional_parameters(layer: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a layer's forward that may be given by position."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return tuple(item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD)[1:]
