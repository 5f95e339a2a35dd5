"""How many tokens a model keeps: for one block of code, or from now on.

The settings stand in the configuration of each encoder that merges: own models have them as fields, models changed by
`apply_ailurus` in `config.ailurus`. A model can hold several such encoders, as a backbone inside a depth estimator or
the towers of a larger model; all of them are found, and treated alike.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters.controller import controllers_of
from .modeling.settings import (
    HINTS,
    make_settings,
    override,
    overrides_of,
    replaced_by,
    with_overrides,
)

__all__ = ["has_budget", "has_keep_ratio", "keep_ratio_of", "set_keep_ratio", "with_budget"]


@dataclass(frozen=True)
class _Owner:
    """A configuration that keeps settings of adaptive resolution.

    Attributes:
        config: this package's own, or that of a model of transformers with the entry `ailurus`.
        adapted: whether it is the latter.
    """

    config: Any
    adapted: bool

    def stored(self) -> Any:
        """The settings as they stand in the configuration."""
        return make_settings(self.config.ailurus) if self.adapted else self.config

    def current(self) -> Any:
        """The settings that a forward would use that began here."""
        return with_overrides(self.stored(), overrides_of(self.config)) if self.adapted else self.config.current()

    def knows(self, name: str) -> bool:
        return hasattr(self.stored(), "keep_ratio" if name in HINTS else name)

    def overridden(self, overrides: dict[str, Any]) -> Any:
        # An own model that brought its code has a module of settings of its own, which its configuration leads to.
        return override(self.config, overrides) if self.adapted else self.config.overridden(**overrides)

    def store(self, changes: dict[str, Any]) -> None:
        changes = {name: value for name, value in changes.items() if self.knows(name)}
        if self.adapted:
            self.config.ailurus.update(changes)
        else:
            for name, value in changes.items():
                setattr(self.config, name, value)


def has_budget(model: nn.Module) -> bool:
    """Whether the model merges tokens: it is of this package or changed by `apply_ailurus`, or holds one that is."""
    return bool(_owners(model))


@contextmanager
def with_budget(model: nn.Module, **settings: Any) -> Iterator[None]:
    """Within the block the model's forwards use these settings in the place of its own.

    Holds for this thread or asyncio task only, so that several can use one model with budgets of their own, and writes
    to no configuration. Works on own models, on models changed by `apply_ailurus`, and on whatever wraps or holds some:
    PEFT, compiled models, DistributedDataParallel, own backbones inside other models. Blocks nest: a setting of the
    inner one wins. `torch.nn.DataParallel` runs its replicas in other threads, which see none of it.

    Args:
        model: the model.
        settings: any setting of adaptive resolution, such as `keep_ratio=0.25`, `num_clusters`, `stage_keep_ratios`,
            `grouping`, `cluster_layer`, or of LookupViT `compressed_size`; a `keep_ratio` takes the place of exact
            numbers and of `places` that the model or an outer block has. Or what a method takes beside them, for the
            images of the block's forwards: `protect` (batch_size, N) bool, `importance` (batch_size, N) float, `seed`.

    Raises:
        TypeError: the model merges no tokens, or none of its encoders has such a setting.
        ValueError: a setting is out of range or of the wrong type.
    """
    owners = _merging(model)
    for name in settings:
        if not any(owner.knows(name) for owner in owners):
            raise TypeError(f"{type(model).__name__} has no setting {name!r}")
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(owner.overridden({key: value for key, value in settings.items() if owner.knows(key)}))
            owner.current()  # raises here, not in the middle of a forward
        yield


def has_keep_ratio(model: nn.Module) -> bool:
    """Whether the model's budget is a share of its tokens; of LookupViT it is not.

    Raises:
        TypeError: the model has no budget at all.
    """
    return any(owner.knows("keep_ratio") for owner in _merging(model))


def keep_ratio_of(model: nn.Module) -> float:
    """The share of tokens that the model keeps here; of several encoders, the first one's.

    Raises:
        TypeError: the model merges no tokens, or its budget is no share of them.
    """
    return float(_with_ratio(model)[0].current().keep_ratio)


def set_keep_ratio(model: nn.Module, keep_ratio: float) -> None:
    """Write the share of tokens kept to the configuration of every encoder in the model that merges. Exact numbers,
    which would win over it, are cleared.

    Args:
        model: as in `with_budget`.
        keep_ratio: above 0 and at most 1.

    Raises:
        TypeError: the model merges no tokens, or its budget is no share of them.
        ValueError: the ratio is out of range.
    """
    make_settings({"keep_ratio": keep_ratio})  # before anything is written
    change = {"keep_ratio": keep_ratio}
    for owner in _with_ratio(model):
        owner.store({**replaced_by(change), **change})


def _owners(model: nn.Module) -> list[_Owner]:
    """The configurations of all encoders in the model that merge, each once."""
    configs = [(getattr(module, "config", None), False) for module in model.modules()]
    # By what it can do: a checkpoint that brought its code has classes of its own.
    found = [(config, adapted) for config, adapted in configs if hasattr(config, "overridden")]
    found += [(controller.config, True) for controller in controllers_of(model)]
    return [_Owner(config, adapted) for config, adapted in {id(owner): (owner, kind) for owner, kind in found}.values()]


def _merging(model: nn.Module) -> list[_Owner]:
    if owners := _owners(model):
        return owners
    raise TypeError(
        f"{type(model).__name__} merges no tokens, so it has no budget: load a model of this package, or call "
        "apply_ailurus(model)"
    )


def _with_ratio(model: nn.Module) -> list[_Owner]:
    if has_keep_ratio(model):
        return [owner for owner in _merging(model) if owner.knows("keep_ratio")]
    raise TypeError(
        f"{type(model).__name__} has no keep_ratio: its budget is another setting, which model.config and with_budget "
        "take, such as compressed_size of LookupViT"
    )
