"""Runs the tests of `FamilyTests` on every case of the subclass."""

from pathlib import Path

import pytest

_TRACING = ("test_compiles_to_one_graph", "test_exports_with_a_dynamic_batch")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.cls, "cases"):
        cases = metafunc.cls.cases
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tracing takes long: by `make test-slow`, but for the families that stand for the others."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.name.startswith(_TRACING):
            case = item.callspec.params["case"]  # type: ignore[attr-defined]
            if not case.compiled:
                item.add_marker(pytest.mark.slow)
