"""Values that live for one forward of one model.

Hooks of different modules must share what one forward found, and forwards of one model may run in several threads: a
context variable holds the value, apart for every thread. `torch.compile` and `torch.export` cannot trace context
variables; while they trace, a plain attribute takes its place.
"""

import weakref
from contextvars import ContextVar
from typing import Any

import torch


class CallStates:
    """One value per key and per running forward.

    Keys are modules and the like, and no forward keeps one alive: parts of a model that run by themselves never end
    theirs. A mapping is replaced, never changed: a thread or task that inherited it keeps its own.
    """

    def __init__(self, name: str):
        self._context: ContextVar[dict[Any, Any] | None] = ContextVar(name, default=None)
        self._traced: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """The value of this forward, or None."""
        states, name = self._all(), self._name(key)
        # A compiled forward whose graph broke goes on without compiling.
        return states[name] if name in states else self._traced.get(key)

    def take(self, key: Any) -> Any:
        """The value of this forward, or None; it is forgotten."""
        value = self.get(key)
        self.clear(key)
        return value

    def set(self, key: Any, value: Any) -> None:
        """Start a forward, or replace its value; None ends it."""
        if value is None:
            self.clear(key)
        else:
            self._replace({**self._all(), self._name(key): value})

    def clear(self, key: Any) -> None:
        """End a forward."""
        name = self._name(key)
        if name in self._all():
            self._replace({other: value for other, value in self._all().items() if other != name})
        if key in self._traced:
            self._traced = {other: value for other, value in self._traced.items() if other is not key}

    def _name(self, key: Any) -> Any:
        return key if torch.compiler.is_compiling() else weakref.ref(key)

    def _all(self) -> dict[Any, Any]:
        return self._traced if torch.compiler.is_compiling() else self._context.get() or {}

    def _replace(self, states: dict[Any, Any]) -> None:
        if torch.compiler.is_compiling():
            self._traced = states
        else:
            self._context.set({name: value for name, value in states.items() if name() is not None})
