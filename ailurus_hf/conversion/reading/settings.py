"""Settings out of a source's own files, checked as they are read: errors name the file, the setting and its value."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...utils.errors import CheckpointError

__all__ = ["Settings", "check_sizes", "config_of", "label_names", "model_class_names"]

_MAX_LABELS = 1_000_000


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
        return int(self._checked(key, default, _is_size, "a whole number above 0"))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of either sign."""
        return int(self._checked(key, default, lambda value: type(value) is int, "a whole number"))

    def share(self, key: str, default: float) -> float:
        """A number from 0 to below 1, such as a dropout probability."""
        expected = "a number from 0 to below 1"
        return float(self._checked(key, default, lambda value: _is_number(value) and 0 <= value < 1, expected))

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._checked(key, default, lambda value: isinstance(value, bool), "true or false"))

    def pair(self, key: str, default: int | None = None) -> list[int]:
        """(height, width), whole numbers above 0; one number stands for both."""
        sides = self._checked(
            key, default, lambda value: _is_size(value) or _is_list(value, _is_size, 2), "a number or (height, width)"
        )
        return [sides, sides] if isinstance(sides, int) else list(sides)

    def numbers(self, key: str, default: list[float] | None = None, length: int | None = None) -> list[float]:
        """A list of numbers, of this length if one is given."""
        expected = f"a list of {length} numbers" if length else "a list of numbers"
        values = self._checked(key, default, lambda value: _is_list(value, _is_number, length), expected)
        return [float(value) for value in values]

    def choice(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """One of these values."""
        values = list(allowed)
        return self._checked(key, default, lambda value: value in values, " or ".join(map(repr, values)))

    def _checked(self, key: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.values.get(key, default)
        if not valid(value):
            raise CheckpointError(f"{self.where}{key} must be {expected}, got {value!r}")
        return value


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0  # True is an int too


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, valid: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and len(value) == (length or len(value)) and all(map(valid, value))


def check_sizes(settings: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse numbers of layers and classes that the checkpoint cannot have, before anything is made of them.

    Args:
        settings: fields of a configuration, of this package or of transformers.
        num_tensors: how many tensors the checkpoint has; every layer has some.

    Raises:
        CheckpointError: there are more layers than tensors, or more than a million classes.
    """
    head = settings.get("decode_head")
    layers = [settings.get("num_hidden_layers"), settings.get("decoder_num_layers"), settings.get("depths")]
    layers += [head.get("num_layers") if isinstance(head, Mapping) else None]
    for value in layers:
        numbers = value if isinstance(value, list | tuple) else [value]
        count = sum(number for number in numbers if isinstance(number, int))
        if count > num_tensors:
            raise CheckpointError(f"the settings give the model {count} layers, but there are {num_tensors} tensors")
    labels = settings.get("num_labels")
    if isinstance(labels, int) and labels > _MAX_LABELS:
        raise CheckpointError(f"num_labels must be at most {_MAX_LABELS}, got {labels}")


def model_class_names(description: Mapping[str, Any]) -> list[str]:
    """The `architectures` of a `config.json`; none where it has none.

    Raises:
        CheckpointError: it is no list of names.
    """
    names = description.get("architectures")
    if names is not None and not _is_list(names, lambda name: isinstance(name, str)):
        raise CheckpointError(f"config.json: architectures must be a list of class names, got {names!r}")
    return list(names or [])


def config_of(config_class: Any, description: Mapping[str, Any], num_tensors: int) -> Any:
    """The configuration of a model of transformers or of this package, from the content of its `config.json`.

    Raises:
        CheckpointError: a setting is not valid; see also [`check_sizes`].
    """
    check_sizes(description, num_tensors)
    model_class_names(description)
    try:
        return config_class.from_dict(dict(description))
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"config.json is not valid: {' '.join(str(error).split())}") from error


def label_names(names: Any, num_labels: int) -> dict[str, Any]:
    """`id2label` and `label2id`, where `names` is a list with a text for each class; else nothing."""
    if not _is_list(names, lambda name: isinstance(name, str), num_labels):
        return {}
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
