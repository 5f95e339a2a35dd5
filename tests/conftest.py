"""What every test starts from: no network, a Hugging Face cache of its own, fixed seeds, deprecations as errors."""

import logging
import os
import random
import sys
import tempfile
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from .skips import refuse_unexpected

# With several threads the math library divides its sums by how busy the machine is: the same input can then give other
# bits from one call to the next, and many tests compare bits. Tiny models gain nothing from threads anyway.
THREADS = 1

settings.register_profile(
    "ailurus",
    max_examples=20,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ailurus")


class RaiseOnDeprecation(logging.Handler):
    """transformers announces deprecations through its logger, where `filterwarnings = error` does not reach."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise DeprecationWarning(f"logged by {record.name}: {message}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-unexpected-skips", action="store_true", help="fail where a test skips without a declared reason"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return refuse_unexpected(report) if item.config.getoption("no_unexpected_skips") else report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return refuse_unexpected(report) if collector.config.getoption("no_unexpected_skips") else report


def pytest_configure(config: pytest.Config) -> None:
    """Set what Hugging Face libraries read on import; subprocesses inherit it."""
    cache = tempfile.TemporaryDirectory(prefix="ailurus_hf_tests_", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ |= {
        "HF_HOME": cache.name,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": str(THREADS),
    }
    logging.getLogger("transformers").addHandler(RaiseOnDeprecation(logging.WARNING))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """torch compiles a function only so often per process, and counts what earlier tests compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _few_rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes its time for each round of region merging, and another dozen of them shows nothing new."""
    if any(word in request.node.name for word in ("compile", "exports", "and_exported", "one_graph")):
        from ailurus_hf.modeling import grouping_region_merging

        monkeypatch.setattr(grouping_region_merging, "NUM_ROUNDS", 2)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what libraries under test draw from
    torch.manual_seed(0)
