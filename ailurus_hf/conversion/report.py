"""What a conversion tells its caller."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .verification import Verification

__all__ = ["ConversionReport", "KeyRow"]


@dataclass(frozen=True)
class KeyRow:
    """One row of the key table: a source tensor and what became of it."""

    source: str
    shape: tuple[int, ...]
    rule: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Args:
        recipe: name of the recipe.
        source: the file the weights come from.
        sha256: its hash, in hexadecimal.
        output: the folder written, or that would be written.
        written: false after a dry run.
        dtype: dtype of the saved weights, such as "float32".
        num_tensors: tensors in the result.
        num_parameters: numbers in the result.
        dropped: source keys without a place in the model, each with the reason.
        warnings: what deserves a look.
        assumptions: what no file tells and was taken from published models, and how to set it otherwise.
        key_table: every source key.
        verification: what the result was compared with and the largest difference; `None` when not verified.
        model_class: public name of the model class of the result.
        recognised: why "auto" chose this recipe; `None` when the caller named it.
    """

    recipe: str
    source: Path
    sha256: str
    output: Path
    written: bool
    dtype: str
    num_tensors: int
    num_parameters: int
    dropped: Mapping[str, str]
    warnings: tuple[str, ...]
    key_table: tuple[KeyRow, ...]
    verification: Verification | None
    model_class: str = "AiluRusForSemanticSegmentation"
    recognised: str | None = None
    assumptions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        report: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))  # str: the paths
        return report
