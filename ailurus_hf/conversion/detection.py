"""Recognising a source by what only its format has: `ailurus-hf convert auto`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..registry import ARCHITECTURES
from ..utils.errors import CheckpointError
from .reading.files import strip_common_prefix
from .reading.sources import TWINS, find_weights, read_json_beside, read_tensors
from .recipe import Evidence
from .recipes import RECIPES
from .unsupported import OWN_RECIPES, refuse_unsupported, unsupported_family

__all__ = ["AUTO", "choose_recipe", "recognise"]

AUTO = "auto"


def choose_recipe(name: str, source: str | Path) -> tuple[str, Path, str | None]:
    """Find the recipe for a source: the one named, a relative of it whose family the source is of, or with "auto" any.

    Returns:
        The recipe's name, the source's weights, and with "auto" what they were recognised by.

    Raises:
        FileNotFoundError: the source or its weights are missing.
        CheckpointError: the source is unreadable; with "auto" also if it is not recognised.
        ValueError: there is no recipe of this name.
    """
    if name == AUTO:
        return recognise(source)
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(map(repr, [*RECIPES, AUTO]))}, got {name!r}")
    relatives, weights = RECIPES[name].relatives, RECIPES[name].find(source)
    if relatives:  # else there is nothing to choose, and no reason to read the source twice
        evidence = _gather(weights)
        other = OWN_RECIPES.get(unsupported_family(evidence.tensors, evidence.model_type) or "")
        other = "ailurus" if evidence.model_type in ARCHITECTURES else other
        name = other if other in relatives else name
    return name, weights, None


def recognise(source: str | Path) -> tuple[str, Path, str]:
    """Find the recipe for a source.

    Returns:
        The recipe's name, the source's weights, and what they were recognised by.

    Raises:
        FileNotFoundError: the source or its weights are missing.
        CheckpointError: the source is unreadable, of an unsupported family, ambiguous, or none that is known.
    """
    weights = find_weights(source)
    evidence = _gather(weights)
    signs = [(name, sign) for name, recipe in RECIPES.items() for sign in recipe.signs]
    found = [(name, sign) for name, sign in signs if sign.found(evidence)]
    # A family that is no plain ViT may have the names of one, so that only a recipe of its own may come before refusal.
    # Before both comes what this package wrote, whose tensors may have the names of another project's.
    chosen = [(name, sign) for name, sign in found if name == "ailurus"]
    chosen = chosen or [(name, sign) for name, sign in found if name in OWN_RECIPES.values()]
    if not chosen:
        refuse_unsupported(source, evidence.tensors, evidence.model_type)
        chosen = [(name, sign) for name, sign in found if sign.certain] or found
    names = list(dict.fromkeys(name for name, _ in chosen))
    if len(names) == 1:
        return names[0], weights, f"it has {chosen[0][1].looks_for}"
    if names:
        reasons = " and ".join(dict.fromkeys(sign.looks_for for _, sign in chosen))
        raise CheckpointError(
            f"{source} is ambiguous: it has {reasons}, as sources for {' and '.join(map(repr, names))} do; "
            "name the recipe instead of 'auto'"
        )
    looked_for = "; ".join(f"{name}: {sign.looks_for}" for name, sign in signs if sign.certain)
    raise CheckpointError(f"{source} is not recognised; looked for {looked_for}")


def _gather(weights: Path) -> Evidence:
    content = read_tensors(weights, objects=True)
    inner = next((content[name] for name in (*TWINS, "teacher") if _tensors(content.get(name))), None)
    shapes = {name: tuple(t.shape) for name, t in strip_common_prefix(_tensors(inner or content)).items()}
    return Evidence(
        shapes,
        container=tuple(map(str, content)) if inner is not None else (),
        config=read_json_beside(weights),
    )


def _tensors(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
