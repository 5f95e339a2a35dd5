"""Counting what runs: dispatched operations, each of which is one launch or more on a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperationCounter(TorchDispatchMode):
    """Within the block, counts the operations that reach the dispatcher below autograd, by name, except views.

    A view is an operation whose results alias an argument that it does not write to, as its schema says: `view`,
    `expand`, `slice`, `transpose`, `detach`, `alias`, ... So are `reshape` and `contiguous` where nothing is copied,
    since below autograd they are views or copies. Allocations without content (`empty`) and questions about dtypes
    count as nothing either. All else is one: in-place operations, copies, fills (`full`, `arange`), each part of what
    autograd decomposes. What a backend does in several launches (a sort, a `scatter` that copies first) counts as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (is_view(func) or func.overloadpacket in _FREE):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


_FREE = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten._unsafe_view,  # a view whose schema hides it
    torch.ops.aten.promote_types,
}


def is_view(operation: torch._ops.OpOverload) -> bool:
    """Whether the results alias arguments that are not written to."""
    returns = [result.alias_info for result in operation._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
