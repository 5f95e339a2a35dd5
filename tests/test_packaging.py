"""What is installed with the package and what is not: extras, their messages, the command without them."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module

import pytest

from .paths import ROOT
from .skips import is_expected

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml"}


def modules(requirements: list[str]) -> set[str]:
    names = (re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements)
    return {MODULES.get(name, name) for name in names}


CORE = modules(PROJECT["dependencies"])
EXTRAS = {name: modules(wanted) for name, wanted in PROJECT["optional-dependencies"].items() if name != "dev"}


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with this checkout's package."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def imports(node: ast.AST, extra: str = "") -> Iterator[tuple[str, str]]:
    """Modules that run-time code imports from outside, each with the extra that the code around it names."""
    for child in ast.iter_child_nodes(node):
        inside = extra
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.With) and ast.unparse(child.items[0]).startswith("needs_extra("):
            inside = ast.literal_eval(child.items[0].context_expr.args[0])
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield str(child.module).partition(".")[0], inside
        else:
            yield from imports(child, inside)


def test_every_import_is_declared_and_those_of_extras_say_so():
    for path in (ROOT / "ailurus_hf").rglob("*.py"):
        default = "cli" if path.parent.name == "cli" else ""  # ailurus_hf.cli.main has checked that they are there
        found = set(imports(ast.parse(path.read_text())))
        asked_for = {module for module, extra in found if module in EXTRAS.get(extra or default, set())}
        unknown = {module for module, _ in found} - asked_for - CORE - {"ailurus_hf"} - set(sys.stdlib_module_names)
        assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}: see ailurus_hf/utils/extras.py"


PROBE = """
import json, sys
extras = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(extras)  # as if not installed
import ailurus_hf
for name in ailurus_hf.__all__:
    getattr(ailurus_hf, name)
import ailurus_hf.benchmark, ailurus_hf.data, ailurus_hf.demo.scenes, ailurus_hf.evaluation, ailurus_hf.visualization
model = ailurus_hf.AiluRusModel(ailurus_hf.AiluRusConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
                                intermediate_size=8, patch_size=8, image_size=32))
from transformers import AutoModel
model.save_pretrained(sys.argv[2])
assert type(AutoModel.from_pretrained(sys.argv[2])) is type(model)
"""


def test_core_dependencies_are_enough_for_models(tmp_path):
    extras = set().union(*EXTRAS.values()) - {"ailurus-hf"}
    assert extras == {"accelerate", "datasets", "evaluate", "matplotlib", "peft", "rich", "scipy", "triton", "typer"}
    done = fresh(PROBE, json.dumps(sorted(extras)), str(tmp_path))
    assert done.returncode == 0, done.stderr


MESSAGES = """
import json, sys
import ailurus_hf
uses, found = json.loads(sys.argv[1]), []
assert not {"datasets", "evaluate", "matplotlib", "pandas", "typer"} & set(sys.modules), "ailurus_hf is not light"
for package, code in uses:
    installed = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    sys.modules |= dict.fromkeys([package, *installed])  # as if not installed
    try:
        exec(code)
    except ImportError as error:
        found.append(str(error))
    for name in [package, *installed]:
        sys.modules.pop(name, None)
    sys.modules |= installed
print(json.dumps(found))
"""
FIGURE = "from ailurus_hf.visualization import adaptive_resolution_figure as draw; draw(None, None, None, None, None)"
BOUNDARY = (
    "import torch; from ailurus_hf.evaluation import BoundaryScore as S; z = torch.zeros(2, 2).int(); S(2).update(z, z)"
)
USES = [
    ("accelerate", "train", "from ailurus_hf.training import SegmentationTrainer"),
    ("matplotlib", "viz", FIGURE),
    ("datasets", "eval", "from ailurus_hf.evaluation import load_metric; load_metric('depth')"),
    ("evaluate", "eval", "from ailurus_hf.evaluation import load_metric; load_metric('depth')"),
    ("accelerate", "eval", "from ailurus_hf.evaluation import evaluate_segmentation as run; run(None, None, [])"),
    ("scipy", "eval", BOUNDARY),
    ("accelerate", "cli", "from ailurus_hf.cli.options import load_on_device; load_on_device('model', 'auto', None)"),
]


def test_a_missing_extra_is_named_in_one_line():
    done = fresh(MESSAGES, json.dumps([(package, code) for package, _, code in USES]))
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert len(messages) == len(USES)
    for (package, extra, _), message in zip(USES, messages, strict=True):
        assert re.fullmatch(rf".+ need {package}: pip install '\.\[{extra}\]' in the clone of ailurus_hf", message), (
            message
        )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_says_what_it_lacks(package):
    code = f"import sys; sys.modules[{package!r}] = None; from ailurus_hf.cli import main; sys.exit(main(['--help']))"
    done = fresh(code)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"ailurus-hf: error: the commands need {package}: pip install '.[cli]' in the clone of ailurus_hf\n"
    )


def test_the_command_is_where_the_installed_script_looks():
    module, _, function = PROJECT["scripts"]["ailurus-hf"].partition(":")
    assert getattr(import_module(module), function)(["--version"]) == 0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("needs goldens/deit under /shared (set AILURUS_SHARED to the folder that holds it)", {False}),
        ("not possible with the native model: no gradient", {False, True}),
        ("the model has no gradient checkpointing", {False, True}),
        ("needs a CUDA device", {False, True}),
        ("needs triton, which is for Linux", {False, True}),
        ("could not import 'matplotlib'", set()),
        ("unconditional skip", set()),
    ],
)
def test_which_skips_are_expected(reason, expected):
    """Under --no-unexpected-skips; `expected` tells whether the shared recordings may be there when it is accepted."""
    assert {shared_is_here for shared_is_here in (False, True) if is_expected(reason, shared_is_here)} == expected


LAZY = """
import sys
import ailurus_hf
print(sorted({"numpy", "torch", "transformers"} & set(sys.modules)))
"""
HELP = """
import sys
from ailurus_hf.cli import main
code = main(["--help"])
print(code, sorted({"numpy", "torch", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize(("code", "last"), [(LAZY, "[]"), (HELP, "0 []")], ids=["import", "help"])
def test_nothing_heavy_is_imported_before_it_is_needed(code, last):
    done = fresh(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == last
