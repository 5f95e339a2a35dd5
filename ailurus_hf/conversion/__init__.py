"""Checkpoints of other projects become AiluRus checkpoints: one engine, one recipe (a table of rules) per source."""

from ..utils.errors import CheckpointError, CheckpointWarning
from .engine import convert_checkpoint
from .report import ConversionReport, KeyRow

__all__ = ["CheckpointError", "CheckpointWarning", "ConversionReport", "KeyRow", "convert_checkpoint"]
