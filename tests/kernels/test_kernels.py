"""The kernels, in processes of their own: triton decides when a kernel is defined whether it interprets or compiles."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.paths import ROOT

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is for Linux")
OPERATIONS = ["density_peaks", "region_merging", "members"]


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("families", [OPERATIONS, pytest.param(["models"], marks=pytest.mark.slow)], ids=len)
def test_in_the_interpreter(families):
    """What stands in the files of these names, each test of which must pass."""
    paths = [f"tests/kernels/interpreted_{family}.py" for family in families]
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--no-unexpected-skips")
    run("-m", "pytest", *options, *paths, TRITON_INTERPRET="1")


def test_every_file_of_tests_is_run():
    assert {path.stem for path in (ROOT / "tests/kernels").glob("interpreted_*.py")} == {
        f"interpreted_{family}" for family in [*OPERATIONS, "models"]
    }


@needs_triton
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles(capability, tmp_path):
    """As far as the machine code of a GPU, which needs none."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = json.loads(run("tests/kernels/compiling.py", str(capability), PYTHONPATH=_path(), **environment))
    assert set(done["compiled"]) == set(done["kernels"])
    assert len(done["kernels"]) == 10
    assert done["spilled"] == []


def _path():
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


PROBE = """
import sys
from ailurus_hf.modeling.token_groups import REPLACEMENTS
print(len(REPLACEMENTS), "triton.language" in sys.modules)
"""


@needs_triton
def test_off_unless_asked_for():
    assert run("-c", PROBE, AILURUS_KERNELS="0").split()[0] == "0"
    assert run("-c", PROBE, AILURUS_KERNELS="1").split() == ["6", "True"]


def test_without_triton_the_error_names_the_extra():
    code = f"import sys; sys.modules['triton'] = None\n{PROBE}"
    environment = {**os.environ, "AILURUS_KERNELS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fused kernels need triton: pip install '.[kernels]' in the clone of ailurus_hf"
    )
