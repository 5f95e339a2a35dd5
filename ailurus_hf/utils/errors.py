"""Exceptions that more than one part raises."""

__all__ = ["CheckpointError", "CheckpointWarning", "OtherRecipeError"]


class CheckpointError(ValueError):
    """A checkpoint is unreadable, unsafe, or does not fit the model its settings describe."""


class OtherRecipeError(CheckpointError):
    """The source is of a family that another recipe converts, named by `recipe`."""

    def __init__(self, message: str, recipe: str) -> None:
        super().__init__(message)
        self.recipe = recipe


class CheckpointWarning(UserWarning):
    """A checkpoint converts, but something in it deserves a look."""
