"""Why a test may skip. `--no-unexpected-skips` makes any other skip a failure: a test nobody runs guards nothing."""

import re
from typing import TypeVar

import pytest

from .paths import SHARED

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

_NOT_HERE = re.compile(r"needs .+ under .+ \(set AILURUS_SHARED")
_EXPECTED = [
    re.compile(r"not possible with the native model: "),
    re.compile(r"the model has no gradient checkpointing"),
    re.compile(r"needs a CUDA device"),
    re.compile(r"needs triton, which is for Linux"),
]


def is_expected(reason: str, shared_is_here: bool) -> bool:
    """Whether a skip is a declared one; with the recorded outputs at hand none may skip for want of them."""
    if _NOT_HERE.match(reason):
        return not shared_is_here
    return any(pattern.match(reason) for pattern in _EXPECTED)


def refuse_unexpected(report: Report) -> Report:
    """Turn the report of a skip that is not declared into that of a failure."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not is_expected(reason.removeprefix("Skipped: "), SHARED.exists()):
            report.outcome, report.longrepr = "failed", f"unexpected skip (tests/skips.py lists the others): {reason}"
    return report
