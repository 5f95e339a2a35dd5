"""Packages that only a part of this one needs: an extra brings them, and its absence is one line that names it."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Import packages of an extra inside this block.

    Args:
        extra: name in `[project.optional-dependencies]`.
        purpose: who needs them, in the plural: "figures", "the commands".

    Raises:
        ImportError: a package is not installed; the message names it and how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        message = f"{purpose} need {package}: pip install '.[{extra}]' in the clone of ailurus_hf"
        raise ImportError(message, name=package) from error
