"""Which tokens form which group; merging the tokens of a group, and unfolding them again.

`merge_tokens` and `unfold_tokens` are each other's inverse as far as merging has one. Both are segment operations on
sorted indices (an embedding bag and an embedding): deterministic on every device, forward and backward, where a
floating-point scatter-add would depend on the order of atomics.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_Table = TypeVar("_Table")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

REPLACEMENTS: dict[str, Callable[..., Any]] = {}  # what runs in the place of which function, by its name


def replaceable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function in whose place fused kernels may run: what `REPLACEMENTS` has under its name is called with the
    function, to fall back on, and its arguments."""

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        other = REPLACEMENTS.get(function.__name__)
        return function(*args, **kwargs) if other is None else other(function, *args, **kwargs)

    return run


class TokenGroups(NamedTuple):
    """Which tokens of a grid of N form which of M groups.

    Attributes:
        assignment: (batch_size, N) int64, each token's group in [0, M).
        sizes: (batch_size, M) int64, number of members; every group has at least one.
        representatives: (batch_size, M) int64, index of the token that stands for each group.
        order: (batch_size, N) int64, token indices sorted by group, in increasing order within a group.
        starts: (batch_size, M) int64, where in `order` the members of each group begin.
    """

    assignment: Tensor
    sizes: Tensor
    representatives: Tensor
    order: Tensor
    starts: Tensor


def group_tokens(assignment: Tensor, num_groups: int, representatives: Tensor | None = None) -> TokenGroups:
    """Describe an assignment, from `cluster_tokens` or any other method, as `TokenGroups`.

    Args:
        assignment: (batch_size, N) int64 in [0, num_groups), every group used at least once in every image.
        num_groups: M.
        representatives: (batch_size, M) int64; each group's first member when None.
    """
    ordered, order = assignment.sort(dim=1, stable=True)
    bounds = torch.searchsorted(ordered, table(_group_bounds, num_groups, assignment.shape[0], like=assignment))
    starts = bounds[:, :-1]
    if representatives is None:
        representatives = order.gather(1, starts)
    return TokenGroups(assignment, bounds.diff(dim=1), representatives, order, starts)


def _group_bounds(num_groups: int, batch_size: int, device: torch.device) -> Tensor:
    return torch.arange(num_groups + 1, device=device).repeat(batch_size, 1)


@replaceable
def merge_tokens(tokens: Tensor, groups: TokenGroups) -> Tensor:
    """Mean of each group's members: (batch_size, N, hidden_size) -> (batch_size, M, hidden_size), same dtype.

    Summed in float32 at least: the sum of a large group is beyond half precision long before its mean is. A group of
    one keeps its token's exact bits.
    """
    batch_size, num_tokens, hidden_size = tokens.shape
    merged = F.embedding_bag(
        flat_index(groups.order, num_tokens).flatten(),
        _summable(tokens).reshape(-1, hidden_size),
        flat_index(groups.starts, num_tokens).flatten(),
        mode="mean",
    )
    return merged.view(batch_size, -1, hidden_size).to(tokens.dtype)


@replaceable
def unfold_tokens(merged: Tensor, groups: TokenGroups) -> Tensor:
    """Copy each group's token to its members: (batch_size, M, hidden_size) -> (batch_size, N, hidden_size).

    The gradient of a group is the sum over its members, in float32 at least as in `merge_tokens`.
    """
    _, num_groups, hidden_size = merged.shape
    # A model spread over several devices may end its merged layers on another one than it began them.
    places = flat_index(groups.assignment.to(merged.device), num_groups)
    if merged.requires_grad:
        return F.embedding(places, _summable(merged).reshape(-1, hidden_size)).to(merged.dtype)
    return F.embedding(places, merged.reshape(-1, hidden_size))


def _summable(tokens: Tensor) -> Tensor:
    """Tokens in a dtype that holds sums over many of them."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (batch_size, N, hidden_size) at the places (batch_size, K) int64 -> (batch_size, K, hidden_size)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def flat_index(index: Tensor, num_rows: int) -> Tensor:
    """Places (batch_size, K) in each image's rows -> places in the rows of all images one after the other; of one image
    they are the same, which saves an operation where it counts most."""
    if index.shape[0] == 1:
        return index
    return index + torch.arange(index.shape[0], device=index.device)[:, None] * num_rows


def refuse_tracing(grouping: str) -> None:
    """Raise RuntimeError in `torch.jit.trace`, which cannot trace a tensor's bits (`Tensor.view(dtype)`)."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot trace grouping {grouping!r}: use torch.export.export, or trace with keep_ratio=1"
        )


def table(build: Callable[..., _Table], *arguments: Any, like: Tensor) -> _Table:
    """`build(*arguments, device)` for tensors that go with `like`, made once and kept. What depends on the arguments
    alone, such as the neighbours on a grid, need not be made in every forward. Nobody may write into a table."""
    capturing = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # memory of a CUDA graph
    # What is built in a graph, or under the mode of a fake tensor, is fake.
    if torch.compiler.is_compiling() or type(like) is not Tensor or capturing:
        return build(*arguments, like.device)
    with torch.inference_mode(False):
        return kept(build, *arguments, like.device)


def kept(build: Callable[..., _Table], *arguments: Any) -> _Table:
    """`build(*arguments)`, made once and kept; in a graph, of which it becomes a part, made there."""
    return build(*arguments) if torch.compiler.is_compiling() else _kept(build, *arguments)


@lru_cache(maxsize=64)
def _kept(build: Callable[..., _Table], *arguments: Any) -> _Table:
    return build(*arguments)
