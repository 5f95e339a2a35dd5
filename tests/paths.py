"""Where the recorded outputs of the original projects are: outside the project, so tests skip without them."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("AILURUS_SHARED", ROOT.parent / "shared"))


def shared(*parts: str) -> Path:
    """A file or folder under `SHARED`; skips the test when it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} under {SHARED} (set AILURUS_SHARED to the folder that holds it)")
    return path


def golden(*parts: str) -> Path:
    """A folder of recorded outputs."""
    return shared("goldens", *parts)
