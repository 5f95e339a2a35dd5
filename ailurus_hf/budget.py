"""The share of tokens that a model keeps, for as long as it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["has_keep_ratio", "keep_ratio_of", "set_keep_ratio", "temporary_keep_ratio"]


def has_keep_ratio(model: Any) -> bool:
    """Whether there is a share of tokens to set: the model is of this package, or changed by `apply_ailurus`."""
    config = getattr(getattr(model, "module", model), "config", None)
    return hasattr(config, "keep_ratio") or isinstance(getattr(config, "ailurus", None), dict)


def keep_ratio_of(model: Any) -> float:
    """The share of tokens that the model keeps."""
    ratio: float = _settings(model)["keep_ratio"]
    return ratio


def set_keep_ratio(model: Any, keep_ratio: float) -> None:
    """Set the share of tokens kept from the next forward on; an exact count, which would win over it, is cleared.

    Args:
        model: a model of this package, one changed by `apply_ailurus`, or either inside a wrapper that hands on
            attributes, such as peft's.
        keep_ratio: above 0 and at most 1.

    Raises:
        TypeError: the model has no such setting.
    """
    _set(model, {"num_clusters": None, "keep_ratio": keep_ratio})


@contextmanager
def temporary_keep_ratio(model: Any, keep_ratio: float | None) -> Iterator[None]:
    """Within the block the model keeps this share of its tokens; None leaves it as it is."""
    if keep_ratio is None:
        yield
        return
    before = _settings(model)
    set_keep_ratio(model, keep_ratio)
    try:
        yield
    finally:
        _set(model, before)


def _settings(model: Any) -> dict[str, Any]:
    config = _config(model)
    if isinstance(getattr(config, "ailurus", None), dict):
        return {name: config.ailurus[name] for name in ("num_clusters", "keep_ratio")}
    return {name: getattr(config, name) for name in ("num_clusters", "keep_ratio")}


def _set(model: Any, settings: dict[str, Any]) -> None:
    config = _config(model)
    if isinstance(getattr(config, "ailurus", None), dict):
        config.ailurus.update(settings)
        return
    for name, value in settings.items():
        setattr(config, name, value)


def _config(model: Any) -> Any:
    """Configuration of the model, or of the one inside a wrapper for several processes."""
    inner = getattr(model, "module", model)
    if not has_keep_ratio(inner):
        raise TypeError(
            f"{type(inner).__name__} has no keep_ratio: load a model of this package, or call apply_ailurus(model)"
        )
    return inner.config
