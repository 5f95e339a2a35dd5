"""Runs the tests of `FamilyTests` on every case of the subclass."""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.cls, "cases"):
        cases = metafunc.cls.cases
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])
