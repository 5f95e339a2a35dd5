"""Exceptions that more than one part raises."""

__all__ = ["CheckpointError", "CheckpointWarning"]


class CheckpointError(ValueError):
    """A checkpoint is unreadable, unsafe, or does not fit the model its settings describe."""


class CheckpointWarning(UserWarning):
    """A checkpoint converts, but something in it deserves a look."""
