"""The counter of operations, which the package's benchmark has too."""

from ailurus_hf.benchmark.operations import OperationCounter, is_view

__all__ = ["OperationCounter", "is_view"]
