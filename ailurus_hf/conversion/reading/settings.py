"""Settings out of a source's own files, checked as they are read: errors name the file, the setting and its value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...utils.errors import CheckpointError

__all__ = ["Settings", "label_names"]


@dataclass(frozen=True)
class Settings:
    """A mapping of settings.

    Args:
        values: the settings.
        where: what precedes a setting's name in messages, such as "variant.yml: net_kwargs.".
    """

    values: Mapping[str, Any]
    where: str

    def section(self, key: str, default: Mapping[str, Any] | None = None) -> "Settings":
        """The mapping under this name."""
        value = default if self.values.get(key) is None else self.values[key]
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}{key} must be a mapping, got {value!r}")
        return Settings(value, f"{self.where}{key}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(key, default)
        if type(value) is not int or value < 1:  # True is an int too
            raise CheckpointError(f"{self.where}{key} must be a whole number above 0, got {value!r}")
        return value

    def share(self, key: str, default: float) -> float:
        """A number from 0 to below 1, such as a dropout probability."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise CheckpointError(f"{self.where}{key} must be a number from 0 to below 1, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}{key} must be true or false, got {value!r}")
        return value

    def pair(self, key: str, default: int | None = None) -> list[int]:
        """(height, width), whole numbers above 0; one number stands for both."""
        value = self.values.get(key, default)
        sides = [value, value] if type(value) is int else value
        if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(type(n) is int and n > 0 for n in sides):
            raise CheckpointError(f"{self.where}{key} must be a number or (height, width), got {value!r}")
        return list(sides)


def label_names(names: Any, num_labels: int) -> dict[str, Any]:
    """`id2label` and `label2id`, where `names` is a list with a text for each class; else nothing."""
    if not isinstance(names, list | tuple) or len(names) != num_labels or not all(isinstance(n, str) for n in names):
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
