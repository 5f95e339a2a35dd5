"""The settings of the methods: declared once, and what holds for one call or one context in their place.

A configuration owns its settings and nothing here ever writes to it. `SettingsMixin.current` gives the settings of a
forward: those of the configuration, under those of the contexts around it (`overridden`), under those of the call.
"""

import difflib
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

_Class = TypeVar("_Class")


def plain_numbers(cls: type[_Class]) -> type[_Class]:
    """Decorates a `@strict` class: NumPy's scalars, also those in lists, become Python's before they are checked, since
    only these pass as what the fields are declared to be, and as JSON."""
    checked = cls.__setattr__

    def set_plain(self: Any, name: str, value: Any) -> None:
        checked(self, name, _plain(value))

    cls.__setattr__ = set_plain  # type: ignore[method-assign]
    return cls


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def at_least(minimum: int) -> Any:
    def check(value: int | None) -> None:
        if value is not None and value < minimum:
            raise ValueError(f"must be at least {minimum}, got {value}")

    return check


def in_unit_interval(include_zero: bool) -> Any:
    def check(value: float) -> None:
        above = value >= 0 if include_zero else value > 0
        if not (above and value <= 1):  # written so that NaN fails too
            raise ValueError(f"must be {'between 0 and 1' if include_zero else 'above 0 and at most 1'}, got {value}")

    return check


def between_zero_and_one(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"must be above 0 and below 1, got {value}")


def one_of(*choices: str | None) -> Any:
    def check(value: str | None) -> None:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return check


def odd(value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"must be odd and above 0, got {value}")


def finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")


def below_one(value: float) -> None:
    if not 0 <= value < 1:  # written so that NaN fails too
        raise ValueError(f"must be at least 0 and below 1, got {value}")


def finite_above_zero(value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"must be finite and above 0, got {value}")


def finite_from_zero(value: float | None) -> None:
    if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"must be finite and at least 0, got {value}")


def finite_or_none(value: float | None) -> None:
    if value is not None:
        finite(value)


def activation(name: str) -> None:
    if name not in ACT2FN:
        close = difflib.get_close_matches(name, ACT2FN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f", such as 'gelu'; one of {', '.join(ACT2FN)}"
        raise ValueError(f"must be an activation that transformers knows, got {name!r}{hint}")


def side_or_sides(value: Any) -> None:
    positive(value)
    if not isinstance(value, int) and len(value) != 2:
        raise ValueError(f"must be one number or (height, width), got {value}")


def positive(values: Any) -> None:
    if not isinstance(values, int) and not len(values):
        raise ValueError(f"must hold at least one number above 0, got {values}")
    for value in [values] if isinstance(values, int) else values:
        if not value > 0:
            raise ValueError(f"must hold numbers above 0, got {value}")


def _ratios(values: Any) -> None:
    for value in values or ():
        if not 0 < value <= 1:
            raise ValueError(f"must hold numbers above 0 and at most 1, got {value}")


def _places(values: Any) -> None:
    if values is None:
        return
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in values]
    if not pairs or any(len(pair) != 2 or type(pair[0]) is not int for pair in pairs):
        raise ValueError(f"must hold pairs (layer, share of tokens to keep), got {values}")
    _ratios([ratio for _, ratio in pairs])
    for (layer, ratio), (next_layer, next_ratio) in pairwise([(-1, 1), *pairs]):
        if next_layer <= layer or next_ratio > ratio:
            raise ValueError(
                f"must hold layers from 0 on, each above the one before, and shares that fall, got {values}"
            )


def _no_places(value: Any) -> None:
    if value is not None:
        raise ValueError(f"must be None where each stage merges by itself, got {value}; use stage_keep_ratios")


def _known_grouping(value: str) -> None:
    from .reduction import GROUPINGS  # reduction imports this file

    if value not in GROUPINGS:
        raise ValueError(
            f"must be one of {', '.join(map(repr, GROUPINGS))}, got {value!r}; register_grouping adds others"
        )


def default_cluster_layer(grouping: str) -> int:
    """After how many layers a method groups the tokens where nothing is set."""
    from .reduction import GROUPINGS

    return GROUPINGS[grouping].cluster_layer


def resolve_num_groups(num_tokens: int, keep_ratio: float = 0.5, num_clusters: int | None = None) -> int:
    """Number of groups M for an image of `num_tokens` patch tokens.

    Args:
        num_tokens: number of patch tokens N, at least 1.
        keep_ratio: share of tokens to keep, in (0, 1]; M is `keep_ratio * num_tokens` rounded half up, at least 1.
        num_clusters: an exact count, which wins over `keep_ratio`; capped at `num_tokens`.
    """
    if num_clusters is not None:
        return min(num_clusters, num_tokens)
    return min(max(int(keep_ratio * num_tokens + 0.5), 1), num_tokens)


@dataclass(repr=False, eq=False)
class SettingsMixin:
    """Settings that a forward reads, and what may hold in their place; the base of every family of settings below.

    Checked on construction and again on every assignment, so `config.keep_ratio = 0.25` holds from the next forward.
    """

    # What they are, in words. Also how they are told apart: a checkpoint that brought its code can have two copies of
    # these classes.
    settings_kind: ClassVar[str] = "settings"

    def current(self, call: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """The settings of a forward that begins here.

        Args:
            call: keyword arguments of the call: settings among them hold, None leaves one as it is.

        Raises:
            ValueError: a setting is out of range or of the wrong type.
        """
        given = {name: call[name] for name in names_of(self) if call.get(name) is not None}
        return with_overrides(self, combine(overrides_of(self), given))

    @contextmanager
    def overridden(self, **overrides: Any) -> Iterator[None]:
        """Within the block forwards of this thread or task use these settings in place of their own."""
        with override(self, overrides):
            yield


@dataclass(repr=False, eq=False)
class AdaptiveResolutionMixin(SettingsMixin):
    """The settings of adaptive resolution, the same in every model.

    Args:
        grouping: which method groups the tokens, a name in `GROUPINGS`: "region_merging", "density_peaks" (the
            paper's), "grid", or one that `register_grouping` added.
        cluster_layer: number of layers that run on all tokens before the tokens are grouped; None takes what the method
            does best with, see `num_dense_layers`.
        keep_ratio: share of patch tokens kept, above 0 and at most 1; at 1 nothing is merged.
        num_clusters: exact number of tokens kept; wins over `keep_ratio`.
        num_neighbors: of density peaks: k, how many nearest neighbours make a token's density.
        neighborhood_size: of density peaks: lambda, how many grid positions around a token count as its neighbourhood.
        spatial_alpha: of density peaks: weight of the feature distance alone, between 0 and 1; the rest grows with the
            neighbour's rank.
        unfold: how the grid comes back: "copy" gives each token its group's output, "residual" adds what made the token
            differ from its group when they were merged.
        tail_layers: number of last layers that run on all tokens again.
        places: for merging more than once, pairs (layer, share of all tokens kept from there on); layers are counted as
            in `cluster_layer`. Wins over `cluster_layer`, `keep_ratio` and `num_clusters`, except that `keep_ratio=1`
            merges nothing. Only for a method that can merge what is merged, such as "region_merging".
        grouping_features: what groups are made by: the tokens as they are ("raw"), or what the next layer's attention
            is about to see of them, its LayerNorm ("norm"); None takes what the method does best with.
    """

    settings_kind: ClassVar[str] = "settings of adaptive resolution"

    grouping: str = validated_field(_known_grouping, default="region_merging")
    cluster_layer: int | None = validated_field(at_least(0), default=None)
    keep_ratio: float | int = validated_field(in_unit_interval(include_zero=False), default=0.5)
    num_clusters: int | None = validated_field(at_least(1), default=None)
    num_neighbors: int = validated_field(at_least(1), default=1)
    neighborhood_size: int = validated_field(at_least(1), default=50)
    spatial_alpha: float | int = validated_field(in_unit_interval(include_zero=True), default=0.9)
    unfold: str = validated_field(one_of("residual", "copy"), default="residual")
    tail_layers: int = validated_field(at_least(0), default=0)
    places: list[Any] | tuple[Any, ...] | None = validated_field(_places, default=None)  # noqa: RUF009
    grouping_features: str | None = validated_field(one_of("raw", "norm", None), default=None)

    @property
    def num_dense_layers(self) -> int:
        """Number of layers that run on all tokens before the first merge."""
        if self.places is not None:
            first: int = self.places[0][0]
            return first
        if self.cluster_layer is not None:
            return self.cluster_layer
        return default_cluster_layer(self.grouping)

    def merged_layers(self, num_hidden_layers: int) -> range:
        """Indices of the layers that run on merged tokens.

        Raises:
            ValueError: no layer is left between `cluster_layer` and `tail_layers`, or `places` has one beyond.
        """
        last = num_hidden_layers - self.tail_layers - 1
        if self.places is not None:
            if self.places[-1][0] > last:
                raise ValueError(
                    f"places must be at most layer {last} with num_hidden_layers={num_hidden_layers} and tail_layers="
                    f"{self.tail_layers}, got {self.places}"
                )
            return range(self.num_dense_layers, last + 1)
        if self.num_dense_layers > last:
            raise ValueError(
                f"cluster_layer must leave a layer to run on merged tokens: with num_hidden_layers="
                f"{num_hidden_layers} and tail_layers={self.tail_layers} it must be at most {last}, "
                f"got {self.num_dense_layers}"
            )
        return range(self.num_dense_layers, last + 1)

    def num_groups(self, num_tokens: int, layer: int | None = None) -> int:
        """Number of groups for this many patch tokens, see `resolve_num_groups`.

        Args:
            num_tokens: of the whole grid.
            layer: the one that is about to run, where `places` has several; None means the last.
        """
        if self.places is None or self.keep_ratio == 1:
            return resolve_num_groups(num_tokens, self.keep_ratio, self.num_clusters)
        reached = [ratio for place, ratio in self.places if layer is None or place <= layer]
        return resolve_num_groups(num_tokens, reached[-1])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As that of transformers' configurations. What is given takes the place of what is stored and would win over
        it, and a dictionary from before there was a choice of method keeps what it meant."""
        stored = as_stored({name: value for name, value in config_dict.items() if name not in replaced_by(kwargs)})
        return super().from_dict(stored, **kwargs)


@dataclass(repr=False, eq=False)
class StageResolutionMixin(AdaptiveResolutionMixin):
    """The settings for hierarchical models, where each stage merges by itself.

    `cluster_layer` and `tail_layers` count a stage's own blocks, and `num_clusters` is an exact number of tokens for
    each stage that merges at all.

    Args:
        stage_keep_ratios: share of tokens kept in each stage, above 0 and at most 1; 1 leaves a stage dense. None means
            1 for the first half of the stages and `keep_ratio` for the others. Wins over `keep_ratio`, except that
            `keep_ratio=1` merges nothing anywhere.
    """

    settings_kind: ClassVar[str] = "settings of adaptive resolution in stages"

    places: Any = validated_field(_no_places, default=None)  # noqa: RUF009
    stage_keep_ratios: list[float | int] | tuple[float | int, ...] | None = validated_field(  # noqa: RUF009
        _ratios, default=None
    )

    def ratios(self, num_stages: int) -> tuple[float, ...]:
        """Share of tokens kept in each stage, as `keep_ratio` and `stage_keep_ratios` together say."""
        if self.keep_ratio == 1:
            return (1.0,) * num_stages
        if self.stage_keep_ratios is not None:
            return tuple(float(ratio) for ratio in self.stage_keep_ratios)
        num_merged = (num_stages + 1) // 2
        return (1.0,) * (num_stages - num_merged) + (float(self.keep_ratio),) * num_merged

    def blocks_of_stage(self, stage: int, depths: list[int] | tuple[int, ...]) -> range:
        """Indices of a stage's blocks that run on merged tokens; empty where the stage keeps all.

        Raises:
            ValueError: the stage is to merge, but no block is left between `cluster_layer` and `tail_layers`.
        """
        if self.ratios(len(depths))[stage] == 1:
            return range(0)
        last = depths[stage] - self.tail_layers - 1
        if self.num_dense_layers > last:
            raise ValueError(
                f"cluster_layer must leave a block to run on merged tokens in stage {stage + 1}: with depths="
                f"{tuple(depths)} and tail_layers={self.tail_layers} it must be at most {last}, got "
                f"{self.num_dense_layers}; lower it, or keep that stage dense with stage_keep_ratios"
            )
        return range(self.num_dense_layers, last + 1)


@dataclass(repr=False, eq=False)
class CompressedSizeMixin(SettingsMixin):
    """The budget of LookupViT: how many compressed tokens the heavy work runs on.

    Args:
        compressed_size: grid of the compressed tokens, (rows, columns), of video (frames, rows, columns); one number
            is that on every axis, and at most all frames. At most the grid of the patches.
    """

    settings_kind: ClassVar[str] = "settings of LookupViT"

    compressed_size: int | list[int] | tuple[int, ...] = validated_field(positive, default=7)  # noqa: RUF009


@plain_numbers
@strict
@dataclass
class AdaptiveResolutionSettings(AdaptiveResolutionMixin):
    """The settings by themselves, for models whose configuration is not this package's."""


@plain_numbers
@strict
@dataclass
class StageResolutionSettings(StageResolutionMixin):
    """The settings of a hierarchical model by themselves."""


@plain_numbers
@strict
@dataclass
class CompressedSizeSettings(CompressedSizeMixin):
    """The budget of LookupViT by itself."""


# What must yield to a setting that is given later, since it would win over it; a ratio does where it is 1.
_REPLACED = {
    "keep_ratio": ("num_clusters", "places", "stage_keep_ratios"),
    "num_clusters": ("places",),
    "cluster_layer": ("places",),
    "places": ("keep_ratio", "num_clusters"),
    "stage_keep_ratios": ("keep_ratio",),
}
_DEFAULTS = {field.name: field.default for field in fields(StageResolutionMixin)}
# What a context may hold beside settings: inputs that some methods take, see `ReductionContext`.
HINTS = ("protect", "importance", "seed")
_CHECKED: dict[type[SettingsMixin], type[SettingsMixin]] = {
    AdaptiveResolutionMixin: AdaptiveResolutionSettings,
    StageResolutionMixin: StageResolutionSettings,
    CompressedSizeMixin: CompressedSizeSettings,
}
_MIXINS = {mixin.settings_kind: mixin for mixin in _CHECKED}
_NAMES = {kind: tuple(field.name for field in fields(mixin)) for kind, mixin in _MIXINS.items()}

Overrides = Mapping[str, Any]
Settings = TypeVar("Settings", bound=SettingsMixin)

# id of the object that owns the settings -> what holds in their place. A context variable, so that threads and tasks
# have their own; torch.compile cannot trace those, but does trace thread-local attributes and guards on them for each
# thread.
_OVERRIDES: ContextVar[Mapping[int, Overrides]] = ContextVar("ailurus_overrides", default=MappingProxyType({}))
_TRACED = threading.local()


def names_of(settings: SettingsMixin) -> tuple[str, ...]:
    """Names of the settings that a configuration, or settings by themselves, have."""
    return _NAMES[settings.settings_kind]


def refuse_unknown(caller: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError for a name among `given` that is not known: a misspelt one would do nothing."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{caller} got an unexpected keyword argument {name!r}{hint}")


def warn_of_misspelt(config: Any, given: Iterable[str]) -> None:
    """Warn of names that a configuration does not know and that look like one of its fields: transformers keeps any
    name, so a misspelt field would do nothing."""
    names = [field.name for field in fields(config)]
    for name in given:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
        if close and name not in names and not hasattr(type(config), name):
            warnings.warn(
                f"{type(config).__name__} has no field {name!r}, which changes nothing; did you mean {close[0]!r}?",
                UserWarning,
                stacklevel=2,
            )


def overrides_of(owner: object) -> Overrides:
    """What the contexts around this call put in the place of `owner`'s settings, hints included."""
    held = getattr(_TRACED, "overrides", {}) if torch.compiler.is_compiling() else _OVERRIDES.get()
    found: Overrides = held.get(id(owner), {})
    return found


@contextmanager
def override(owner: object, overrides: Overrides) -> Iterator[None]:
    """Within the block `overrides_of(owner)` gives these, on top of those of the contexts around it."""
    before = _OVERRIDES.get()
    held = {**before, id(owner): combine(before.get(id(owner), {}), overrides)}
    token, traced = _OVERRIDES.set(held), getattr(_TRACED, "overrides", {})
    _TRACED.overrides = held
    try:
        yield
    finally:
        _OVERRIDES.reset(token)
        _TRACED.overrides = traced


def replaced_by(given: Overrides) -> dict[str, Any]:
    """The settings that would win over those given, and so must yield to them, with their defaults."""
    names = [name for key, losers in _REPLACED.items() if given.get(key) is not None for name in losers]
    return {name: _DEFAULTS[name] for name in names if name not in given}


def combine(outer: Overrides, inner: Overrides) -> Overrides:
    """Overrides under others: a ratio from inside takes the place of exact numbers from outside."""
    replaced = replaced_by(inner)
    return {**{name: value for name, value in outer.items() if name not in replaced}, **inner}


def with_overrides(settings: Settings, overrides: Overrides) -> Settings:
    """Settings with others in the place of some; the same object where there are none.

    Raises:
        ValueError: a setting is out of range or of the wrong type.
    """
    changed = {name: value for name, value in overrides.items() if name not in HINTS}
    if not changed:
        return settings
    replaced = replaced_by(changed)
    values = {name: replaced.get(name, getattr(settings, name)) for name in names_of(settings)}
    result: Settings = make_settings({**values, **changed}, _MIXINS[settings.settings_kind])
    return result


def as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file has them, with what they meant when there was one method: all later ones name theirs."""
    return dict(values) if "grouping" in values else {"grouping": "density_peaks", **values}


def make_settings(values: Mapping[str, Any], mixin: type[SettingsMixin] = AdaptiveResolutionMixin) -> Any:
    """Settings from a plain dictionary.

    Raises:
        ValueError: one of them is out of range, of the wrong type or unknown.
    """
    if torch.compiler.is_compiling():
        return mixin(**values)  # the same without checks, which cannot be traced
    try:
        return _CHECKED[mixin](**values)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{mixin.settings_kind}: {' '.join(str(error).split())}") from None
