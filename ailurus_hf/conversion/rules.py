"""The vocabulary of a conversion recipe: what happens to each tensor of a source checkpoint.

A recipe is a table of these rules: data only, no code. [`ailurus_hf.conversion.engine`] applies them.

A pattern is a tensor name, matched as a whole and literally, with three kinds of placeholders:

- `{layer}` (any name): one integer without leading zeros, such as the `7` in `blocks.7.norm1.weight`;
- `{param:weight|bias}`: one of the alternatives given;
- `{rest:*}`: anything, dots included.

A target is a tensor name in which the pattern's placeholders may be repeated: `{layer}`, `{param}`, `{rest}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

__all__ = [
    "BATCH_NORM",
    "PARAM",
    "Drop",
    "Flatten",
    "Rename",
    "Rule",
    "SplitRows",
    "Transpose",
    "fill",
    "match",
    "renames",
    "source_of",
]

# placeholders for the tensors of a layer, and of a batch norm
PARAM = "{param:weight|bias}"
BATCH_NORM = "{param:weight|bias|running_mean|running_var|num_batches_tracked}"

_PLACEHOLDER = re.compile(r"\{(?P<name>[a-z_]+)(?::(?P<choices>[^{}]+))?\}")
_INTEGER = "0|[1-9][0-9]*"  # as programs write it: "01" would be a second name for layer 1


@dataclass(frozen=True)
class _ToOne:
    """A rule whose tensor becomes one tensor, named `target`."""

    pattern: str
    target: str
    optional: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)


class Rename(_ToOne):
    """The tensor keeps its values and takes the name `target`."""


class Transpose(_ToOne):
    """A matrix used as `x @ P` becomes the weight of a linear layer, which computes `x @ weight.T`."""


class Flatten(_ToOne):
    """The weight of a 1 x 1 convolution, (rows, columns, 1, 1), becomes that of a linear layer, (rows, columns)."""


@dataclass(frozen=True)
class SplitRows:
    """The tensor is cut along its first axis into as many equal parts as there are `targets`, in that order.

    For fused projections: the rows of `qkv` are those of q, then k, then v.
    """

    pattern: str
    targets: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Drop:
    """The tensor has no place in the model, for the reason given (shown to the user)."""

    pattern: str
    reason: str
    optional: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return ()


Rule = Rename | SplitRows | Transpose | Flatten | Drop


def renames(layers: Mapping[str, str], source: str = "", target: str = "", optional: bool = False) -> tuple[Rule, ...]:
    """Rules for weight and bias of layers: names of the source -> ours, and what precedes them on both sides."""
    return tuple(Rename(f"{source}{old}.{PARAM}", f"{target}{new}.{{param}}", optional) for old, new in layers.items())


def match(rule: Rule, key: str) -> dict[str, str] | None:
    """Match a whole tensor name against the rule's pattern.

    Returns:
        The text of each placeholder, or `None` when the name is not one of this rule's.
    """
    found = _compile(rule.pattern).fullmatch(key)
    return None if found is None else found.groupdict()


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put the placeholders' values into a target (or a pattern)."""
    return _PLACEHOLDER.sub(lambda placeholder: values[placeholder["name"]], template)


def source_of(rule: Rule, target_key: str) -> str | None:
    """The source name from which this rule would make `target_key`; `None` when it makes no such tensor.

    Used to tell the user which key of *their* file is missing. A rule whose target forgets a placeholder cannot be read
    backwards and answers `None` too.
    """
    placeholders = _placeholders(rule.pattern)
    for target in rule.targets:
        if _placeholders(target).keys() != placeholders.keys():
            continue
        # The target becomes a pattern, with the choices that its placeholders had in the source's.
        found = _compile(fill(target, placeholders)).fullmatch(target_key)
        if found is not None:
            return fill(rule.pattern, found.groupdict())
    return None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, for `fullmatch`; everything outside the placeholders is escaped."""
    pieces, end = [], 0
    for placeholder in _PLACEHOLDER.finditer(pattern):
        pieces.append(_literal(pattern[end : placeholder.start()], pattern))
        pieces.append(f"(?P<{placeholder['name']}>{_expression(placeholder['choices'])})")
        end = placeholder.end()
    pieces.append(_literal(pattern[end:], pattern))
    return re.compile("".join(pieces))


def _literal(text: str, pattern: str) -> str:
    if "{" in text or "}" in text:
        raise ValueError(f"bad placeholder in the pattern {pattern!r}: use {{name}}, {{name:a|b}} or {{name:*}}")
    return re.escape(text)


def _expression(choices: str | None) -> str:
    if choices is None:
        return _INTEGER
    if choices == "*":
        return ".+"
    return "|".join(re.escape(choice) for choice in choices.split("|"))


def _placeholders(text: str) -> dict[str, str]:
    """The placeholders as they are written, by name."""
    return {found["name"]: found[0] for found in _PLACEHOLDER.finditer(text)}
