"""Making a sequence of tokens shorter, and long again: the one place that wires the method.

`reduce` takes the tokens of a grid to a `Reduction`: fewer tokens, how much each counts, where each stands, and
`restore`, which brings the full grid back. `reduce_sequence` does so inside a sequence that other tokens precede or
follow.

A method is a row in `GROUPINGS`. Most give each token a group, and get merging, weights and unfolding for nothing; one
that does something else (soft assignment, pruning with return, several places, parameters of its own) makes the
`Reduction`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .grouping_density_peaks import cluster_tokens
from .grouping_grid import grid_cells
from .grouping_region_merging import NUM_FEATURES, NUM_ROUNDS, merge_regions
from .settings import HINTS, AdaptiveResolutionMixin, overrides_of
from .token_groups import TokenGroups, group_tokens, merge_tokens, replaceable, table, take_tokens, unfold_tokens

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """Fewer tokens in the place of many, and the way back.

    Attributes:
        tokens: (batch_size, M, hidden_size).
        log_sizes: (batch_size, M) float32, logarithm of how many tokens each stands for, which attention adds to its
            scores.
        restore: tokens (batch_size, M, hidden_size), from whatever layer -> (batch_size, N, hidden_size).
        kept_positions: gives (batch_size, M) int64, place among the N tokens of the one that stands for each. A
            function, since most layers never ask.
        merge: tokens of the grid (batch_size, N, any width) -> (batch_size, M, that width), the way `tokens` came
            about; for layers that look at the grid in between. None where there is no such thing.
        spread: (batch_size, M, any width) -> (batch_size, N, that width), each token copied to all it stands for; None
            as for `merge`.
        residual: (batch_size, N, hidden_size), what `restore` adds to that; None for nothing.
        groups: which token is in which group, where the method has groups.
        of_patches: the reduction of the patch tokens alone, where the sequence holds others too.
    """

    tokens: Tensor
    log_sizes: Tensor
    restore: Callable[[Tensor], Tensor]
    kept_positions: Callable[[], Tensor]
    merge: Callable[[Tensor], Tensor] | None = None
    spread: Callable[[Tensor], Tensor] | None = None
    residual: Tensor | None = None
    groups: TokenGroups | None = None
    of_patches: "Reduction | None" = None


@dataclass(frozen=True)
class ReductionContext:
    """What a method may ask for beside the tokens; whoever calls fills in what it has.

    Attributes:
        norm: the LayerNorm of the layer that is about to run, (..., hidden_size) -> same.
        keys: gives that layer's keys, (batch_size, N, hidden_size), heads one after the other.
        previous: gives the tokens before the last layer that ran, (batch_size, N, hidden_size).
        class_attention: gives what the class token's query of that layer gives each patch token, mean over the heads,
            (batch_size, N).
        protect: (batch_size, N) bool, tokens that must stay by themselves.
        importance: (batch_size, N) float, how much detail matters there.
        seed: for methods that draw random numbers.
        reduction: the reduction of the patch tokens so far, at a method's second place and later; its `restore` leads
            on to the full grid.
    """

    norm: Callable[[Tensor], Tensor] | None = None
    keys: Callable[[], Tensor] | None = None
    previous: Callable[[], Tensor] | None = None
    class_attention: Callable[[], Tensor] | None = None
    protect: Tensor | None = None
    importance: Tensor | None = None
    seed: int | None = None
    reduction: Reduction | None = None

    def require(self, name: str) -> Any:
        """The entry of that name.

        Raises:
            ValueError: the caller has none.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"this grouping needs {name!r}, which this encoder does not have or was not given; choose another one"
            )
        return value


Assign = Callable[
    [Tensor, Grid, int, AdaptiveResolutionMixin, ReductionContext], tuple[Tensor, Tensor | None] | TokenGroups
]
Reduce = Callable[[Tensor, Grid, int, AdaptiveResolutionMixin, ReductionContext], Reduction | None]


@dataclass(frozen=True)
class Grouping:
    """One method, by one of three functions; the first two take (tokens (batch_size, N, hidden_size), grid, number of
    groups M below N, settings, context).

    Attributes:
        assign: gives (batch_size, N) int64, the group of each token, each of M used, and (batch_size, M) int64, the
            token that stands for each, or None for each group's first; or all of `TokenGroups`.
        reduce: gives a `Reduction`, or None to leave the tokens as they are.
        build: makes of a model's configuration a module with parameters, whose forward is as `reduce`; the model owns
            it.
        places: (settings, layers that run on merged tokens) -> those before which it is called; by default the first.
        repeats: whether it can merge what is merged, for `places` of the settings: at the second place and later
            `assign` is given the merged tokens (batch_size, K, hidden_size), `context.reduction` knows their groups,
            and what it gives is for the whole grid as ever.
        cluster_layer: what the settings' `cluster_layer=None` stands for.
        features: what the settings' `grouping_features=None` stands for, "raw" or "norm"; see `features`.
        takes: which of the hints `protect`, `importance` and `seed` it heeds; others are refused.
        flops: (settings, number of tokens, hidden_size) -> floating-point operations of grouping one image's tokens
            that are no matrix product, which PyTorch counts by itself; None for none.
    """

    assign: Assign | None = None
    reduce: Reduce | None = None
    build: Callable[[Any], nn.Module] | None = None
    places: Callable[[AdaptiveResolutionMixin, range], Sequence[int]] | None = None
    repeats: bool = False
    cluster_layer: int = 2
    features: str = "raw"
    takes: tuple[str, ...] = ()
    flops: Callable[[AdaptiveResolutionMixin, int, int], int] | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.assign, self.reduce, self.build)) != 1:
            raise ValueError("a grouping must have one of assign, reduce and build")


@torch.no_grad()
def features(tokens: Tensor, settings: AdaptiveResolutionMixin, context: ReductionContext) -> Tensor:
    """What a method compares tokens by, as the settings' `grouping_features` says: the tokens, or what the attention of
    the next layer is about to see of them. A method that prefers the latter takes the former where no norm is known."""
    wanted = settings.grouping_features or GROUPINGS[settings.grouping].features
    if wanted == "raw" or (settings.grouping_features is None and context.norm is None):
        return tokens
    norm = context.require("norm")
    # Hooks are for who looks at the layer's own call.
    normed: Tensor = (norm.forward if isinstance(norm, nn.Module) else norm)(tokens)
    return normed


@replaceable
def _density_peaks(
    tokens: Tensor, grid: Grid, num_groups: int, settings: AdaptiveResolutionMixin, context: ReductionContext
) -> tuple[Tensor, Tensor]:
    return cluster_tokens(
        features(tokens, settings, context),
        grid,
        num_groups,
        num_neighbors=settings.num_neighbors,
        neighborhood_size=settings.neighborhood_size,
        spatial_alpha=settings.spatial_alpha,
    )


def _density_peaks_flops(settings: AdaptiveResolutionMixin, num_tokens: int, hidden_size: int) -> int:
    """Subtract, square and add over the hidden size, once for each pair of neighbours."""
    return 3 * hidden_size * num_tokens * math.ceil(min(settings.neighborhood_size, num_tokens) / 2)


def _grid(
    tokens: Tensor, grid: Grid, num_groups: int, settings: AdaptiveResolutionMixin, context: ReductionContext
) -> tuple[Tensor, Tensor]:
    assignment, representatives = table(grid_cells, grid, num_groups, like=tokens)
    return assignment.repeat(tokens.shape[0], 1), representatives.repeat(tokens.shape[0], 1)  # which users may change


@replaceable
def _region_merging(
    tokens: Tensor, grid: Grid, num_groups: int, settings: AdaptiveResolutionMixin, context: ReductionContext
) -> tuple[Tensor, Tensor]:
    merged = None if context.reduction is None else context.reduction.groups
    return merge_regions(features(tokens, settings, context), grid, num_groups, protect=context.protect, merged=merged)


def _region_merging_flops(settings: AdaptiveResolutionMixin, num_tokens: int, hidden_size: int) -> int:
    """Subtract, square and add over the projected features of both ends of an edge, four edges a token, every round."""
    num_places = 1 if settings.places is None else len(settings.places)
    return 3 * min(hidden_size, NUM_FEATURES) * 4 * num_tokens * NUM_ROUNDS * num_places


GROUPINGS: dict[str, Grouping] = {
    "density_peaks": Grouping(assign=_density_peaks, flops=_density_peaks_flops),
    "region_merging": Grouping(
        assign=_region_merging,
        repeats=True,
        cluster_layer=1,
        features="norm",
        takes=("protect",),
        flops=_region_merging_flops,
    ),
    "grid": Grouping(assign=_grid),
}


def register_grouping(name: str, grouping: Grouping | Assign, *, overwrite: bool = False) -> None:
    """Add a method, for own models, SegFormer and adapters alike: `grouping=name` chooses it.

    Args:
        name: for the settings.
        grouping: its row, or just a function that gives each token a group, see `Grouping.assign`.
        overwrite: replace one of that name.

    Raises:
        ValueError: there is one of that name.
    """
    if name in GROUPINGS and not overwrite:
        raise ValueError(f"grouping {name!r} is registered already; choose another name, or overwrite=True")
    GROUPINGS[name] = grouping if isinstance(grouping, Grouping) else Grouping(assign=grouping)


@contextmanager
def registered(name: str, grouping: Grouping | Assign) -> Iterator[None]:
    """Within the block there is a method of that name, in every thread; for experiments and tests."""
    register_grouping(name, grouping)
    try:
        yield
    finally:
        del GROUPINGS[name]


def build_reducer(config: Any) -> nn.Module | None:
    """The module of a method that has parameters, for the model that will own it; None for the others."""
    build = GROUPINGS[config.grouping].build
    return None if build is None else build(config)


def reduce(
    tokens: Tensor,
    grid: Grid,
    num_groups: int,
    settings: AdaptiveResolutionMixin,
    context: ReductionContext | None = None,
    method: Reduce | None = None,
) -> Reduction | None:
    """Reduce the tokens of a grid by the method that the settings name.

    Args:
        tokens: (batch_size, N, hidden_size), row by row.
        grid: sizes of the grid's axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        num_groups: M, how many tokens to keep.
        settings: which method, and its constants.
        context: what the method may ask for.
        method: use this one instead, such as the module that `build_reducer` gave.

    Returns:
        The reduction; None where nothing is to be merged.

    Raises:
        ValueError: the method takes a hint that it cannot heed, needs what the caller does not have, or has parameters
            and no model owns its module.
    """
    if torch.jit.is_tracing():  # where sizes are tensors
        grid, num_groups = tuple(int(size) for size in grid), int(num_groups)
    if num_groups >= tokens.shape[1]:
        return None
    row, context = GROUPINGS[settings.grouping], context or ReductionContext()
    _refuse_hints(settings.grouping, row, context)
    if method is not None:
        return method(tokens, grid, num_groups, settings, context)
    if row.reduce is not None:
        return row.reduce(tokens, grid, num_groups, settings, context)
    if row.assign is None:
        raise ValueError(
            f"grouping {settings.grouping!r} has parameters, and this model was built without them: set it in the "
            "configuration that the model is made from"
        )
    found = row.assign(tokens, grid, num_groups, settings, context)
    groups = found if isinstance(found, TokenGroups) else group_tokens(found[0], num_groups, found[1])
    if context.reduction is not None:  # means and residuals are those of the grid that the merged tokens stand for
        tokens = context.reduction.restore(tokens)
    return reduce_to_groups(tokens, groups, settings.unfold)


def _refuse_hints(name: str, row: Grouping, context: ReductionContext) -> None:
    for hint in HINTS:
        if getattr(context, hint) is not None and hint not in row.takes:
            able = [other for other, candidate in GROUPINGS.items() if hint in candidate.takes]
            raise ValueError(f"grouping {name!r} does not heed {hint!r}; those that do: {', '.join(able) or 'none'}")


def reduce_to_groups(tokens: Tensor, groups: TokenGroups, unfold: str = "residual") -> Reduction:
    """Each group's mean in the place of its members; gradient flows through means and residuals."""
    merged, residual, log_sizes = _merge_groups(tokens, groups, unfold)
    return Reduction(
        tokens=merged,
        log_sizes=log_sizes,
        restore=partial(restore_groups, groups=groups, residual=residual),
        kept_positions=lambda: groups.representatives,
        merge=partial(merge_tokens, groups=groups),
        spread=partial(unfold_tokens, groups=groups),
        residual=residual,
        groups=groups,
    )


@replaceable
def _merge_groups(tokens: Tensor, groups: TokenGroups, unfold: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Each group's mean, the residual of each token, and the logarithm of each group's size."""
    merged = merge_tokens(tokens, groups)
    residual = tokens - unfold_tokens(merged, groups) if unfold == "residual" else None
    return merged, residual, groups.sizes.log()


@replaceable
def restore_groups(tokens: Tensor, groups: TokenGroups, residual: Tensor | None) -> Tensor:
    """Each group's token for all its members, and what made each of them differ from it.

    Args:
        tokens: (batch_size, M, hidden_size), perhaps on another device than the rest, where a model is spread over
            several.

    Returns:
        (batch_size, N, hidden_size).
    """
    unfolded = unfold_tokens(tokens, groups)
    return unfolded if residual is None else unfolded + residual.to(unfolded.device)


def reduce_sequence(
    sequence: Tensor,
    grid: Grid,
    num_groups: int,
    settings: AdaptiveResolutionMixin,
    context: ReductionContext | None = None,
    *,
    num_prefix: int = 0,
    num_suffix: int = 0,
    order: Tensor | None = None,
    method: Reduce | None = None,
) -> Reduction | None:
    """`reduce` for the patch tokens inside a sequence; those before and behind them pass untouched and count once.

    Args:
        sequence: (batch_size, num_prefix + N + num_suffix, hidden_size); at a method's second place and later, when
            `context.reduction` says so, fewer patch tokens.
        num_prefix: class, distillation and register tokens in front of the patch tokens.
        num_suffix: tokens behind them.
        order: (batch_size, N) int64, for each position of the grid the place of its token among the patch tokens; None
            where they stand in the grid's order.
    """
    num_patches = sequence.shape[1] - num_prefix - num_suffix
    prefix, tokens, suffix = sequence.split([num_prefix, num_patches, num_suffix], dim=1)
    if order is not None and (context is None or context.reduction is None):
        tokens = take_tokens(tokens, order)
    inner = reduce(tokens, grid, num_groups, settings, context, method)
    if inner is None:
        return None
    parts = (num_prefix, inner.tokens.shape[1], num_suffix, order)
    return Reduction(
        tokens=torch.cat([prefix, inner.tokens, suffix], dim=1) if num_prefix or num_suffix else inner.tokens,
        log_sizes=F.pad(inner.log_sizes, (num_prefix, num_suffix)),
        restore=partial(_restore_sequence, inner.restore, *parts),
        kept_positions=partial(_kept_in_sequence, inner, math.prod(grid), num_prefix, num_suffix, order),
        merge=partial(_merge_sequence, inner.merge, math.prod(grid), num_prefix, order) if inner.merge else None,
        spread=partial(_restore_sequence, inner.spread, *parts) if inner.spread else None,
        groups=inner.groups,
        of_patches=inner,
    )


def _restore_sequence(
    restore: Callable[[Tensor], Tensor],
    num_prefix: int,
    num_tokens: int,
    num_suffix: int,
    order: Tensor | None,
    sequence: Tensor,
) -> Tensor:
    """(batch_size, prefix + M + suffix, any width) -> (batch_size, prefix + N + suffix, that width)."""
    if sequence.shape[1] != num_prefix + num_tokens + num_suffix:
        raise RuntimeError(
            f"expected {num_prefix + num_tokens + num_suffix} merged tokens to unfold, got {sequence.shape[1]}: this "
            "model adds or removes tokens between its layers, which its row in the table of families does not say"
        )
    prefix, tokens, suffix = sequence.split([num_prefix, num_tokens, num_suffix], dim=1)
    tokens = restore(tokens)
    if order is not None:
        tokens = take_tokens(tokens, order.argsort(dim=1).to(tokens.device))
    return torch.cat([prefix, tokens, suffix], dim=1) if num_prefix or num_suffix else tokens


def _merge_sequence(
    merge: Callable[[Tensor], Tensor], num_patches: int, num_prefix: int, order: Tensor | None, sequence: Tensor
) -> Tensor:
    """(batch_size, prefix + N + suffix, any width) -> (batch_size, prefix + M + suffix, that width)."""
    prefix, tokens, suffix = sequence.tensor_split([num_prefix, num_prefix + num_patches], dim=1)
    tokens = merge(tokens if order is None else take_tokens(tokens, order))
    return torch.cat([prefix, tokens, suffix], dim=1)


def _kept_in_sequence(
    inner: Reduction, num_patches: int, num_prefix: int, num_suffix: int, order: Tensor | None
) -> Tensor:
    """(batch_size, prefix + M + suffix) int64, place in the full sequence of the token that stands for each."""
    kept = inner.kept_positions()
    kept = kept if order is None else order.gather(1, kept)
    end = num_prefix + num_patches
    prefix = torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1)
    suffix = torch.arange(end, end + num_suffix, device=kept.device).expand(kept.shape[0], -1)
    return torch.cat([prefix, kept + num_prefix, suffix], dim=1)


def groups_of(reduction: Reduction | None, tokens: Tensor, num_prefix: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Assignment and sizes, for a model's output; every token by itself where nothing was reduced, None where the
    method has no groups.

    Args:
        tokens: (batch_size, num_prefix + N, hidden_size), of the full grid.
    """
    if reduction is not None:
        groups = reduction.groups
        return (None, None) if groups is None else (groups.assignment, groups.sizes)
    assignment = torch.arange(tokens.shape[1] - num_prefix, device=tokens.device).expand(tokens.shape[0], -1)
    return assignment, torch.ones_like(assignment)


def merge_places(settings: AdaptiveResolutionMixin, merged_layers: range) -> Sequence[int]:
    """Layers before which the method is called, of those that run on merged tokens; most methods merge once.

    Raises:
        ValueError: the settings have `places`, and the method cannot merge again, or chooses its own.
    """
    row = GROUPINGS[settings.grouping]
    if settings.places is None:
        return merged_layers[:1] if row.places is None else row.places(settings, merged_layers)
    if not row.repeats:
        able = ", ".join(repr(name) for name, candidate in GROUPINGS.items() if candidate.repeats)
        raise ValueError(f"places needs a grouping that can merge what is merged, {able}; got {settings.grouping!r}")
    later = [place for place, _ in settings.places if place in merged_layers[1:]]
    return [*merged_layers[:1], *later]


def hints_of(owner: object) -> dict[str, Any]:
    """The hints that the contexts around this call give for `owner`, as arguments of `ReductionContext`."""
    overrides = overrides_of(owner)
    return {name: overrides[name] for name in HINTS if overrides.get(name) is not None}
