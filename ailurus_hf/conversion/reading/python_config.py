"""Settings out of mmsegmentation's config files, which are Python programs, without running them.

Only assignments of literals are read: numbers, texts, lists, tuples, dictionaries, `dict(...)`, and names assigned
before. Anything else in the file is skipped, and an assignment that needs it has no value.
"""

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...utils.errors import CheckpointError
from .files import check_size

__all__ = ["parse_config", "python_configs"]

_MAX_LETTERS = 1_000_000


class _NotLiteral(Exception):
    """An expression would have to be run to be known."""


def python_configs(content: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts of the configs in a checkpoint of OpenMMLab's tools, by place, and what it tells of the data set.

    The latter are `classes`, `palette` and `reduce_zero_label`, where they are there.
    """
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    texts = {f"meta.{name}": meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)}
    data = meta.get("dataset_meta")
    labels = data if isinstance(data, Mapping) else {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    return texts, dict(labels)


def parse_config(text: str, name: str) -> dict[str, Any]:
    """Read the assignments of literals in a config.

    Args:
        text: the program.
        name: where it is from, for messages.

    Raises:
        CheckpointError: it is too long, no Python, or its values are too many.
    """
    if len(text) > _MAX_LETTERS:
        raise CheckpointError(f"{name} is refused: longer than {_MAX_LETTERS} letters, so no config")
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{name} is not readable as a Python config: {type(error).__name__}") from error
    values: dict[str, Any] = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            if isinstance(target, ast.Name):
                values.pop(target.id, None)  # a name assigned anew and unreadably must not keep its old value
                with suppress(_NotLiteral, TypeError, RecursionError):  # TypeError: a list as a key, minus of a text
                    values[target.id] = _value(statement.value, values)
    check_size(values, name)
    return values


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=elements):
            return [_value(element, names) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element, names) for element in elements)
        case ast.Dict(keys=keys, values=values) if all(key is not None for key in keys):
            return {_value(k, names): _value(v, names) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _value(keyword.value, names) for keyword in keywords}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
    raise _NotLiteral
