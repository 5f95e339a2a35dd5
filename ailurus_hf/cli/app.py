"""`ailurus-hf`: the subcommands, and how their errors reach the user.

A user's mistake is one line on stderr and exit code 2; `--debug` shows its traceback too. An interruption is one line
and exit code 130. Anything else is a bug: it keeps its traceback, and the exit code is 1.
"""

import dis
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from .. import __version__
from .benchmark import benchmark
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .info import info
from .predict import predict
from .visualize import visualize

PROGRAM = "ailurus-hf"
_PACKAGE = __name__.partition(".")[0]
_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|storage size calculation overflowed", re.IGNORECASE
)
# Python arguments in the package's messages -> the options that set them.
_OPTIONS = {
    r"\boverwrite=True\b": "--overwrite",
    r"\bSet num_labels, ignore_index, or reduce_labels\b": "Give --ignore-index, or --reduce-labels",
    r"\bignore_index=(-?\d+)": r"--ignore-index \1",
    r"\bignore_index must\b": "--ignore-index must",
    r"\bsliding_window needs\b": "--sliding-window needs",
    r"\bscales must\b": "--scale must",
}

app = typer.Typer(
    name=PROGRAM,
    help="Segment images with vision transformers that run most layers on a fraction of the tokens (AiluRus).",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, predict, evaluate, visualize, benchmark, convert, info):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where errors come from; may stand anywhere in the line.")
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"{PROGRAM} {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; by default those of this process.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 when interrupted, or what a subcommand chose.
    """
    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        with _terminate_like_interrupt():
            code = command.main(args=words, prog_name=PROGRAM, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = _user_mistake(error)
        if message is None:
            raise
        if debug:
            traceback.print_exception(error)
        _complain(f"error: {message}")
        return 2
    if code == 130:  # typer turns KeyboardInterrupt into this code
        _complain("interrupted; nothing half-written was left behind")
    return code if isinstance(code, int) else 0


def _user_mistake(error: Exception) -> str | None:
    """The line that explains a user's mistake, or `None` for what must keep its traceback."""
    if hasattr(error, "format_message"):  # typer's usage errors
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _one_line(error.format_message()) + hint
    if _is_expected(error):
        return _in_options(_one_line(str(error)) or type(error).__name__)
    return None


def _is_expected(error: Exception) -> bool:
    """Whether an error is about what the user gave: this package says so itself, or it is one of files, of what a file
    or a configuration holds, or of memory."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if isinstance(error, OSError | StrictDataclassError | SafetensorError | MemoryError):
        return True
    if isinstance(error, RuntimeError):
        return bool(_NO_MEMORY.search(str(error)))
    return isinstance(error, ValueError | TypeError | ImportError) and _is_raised_here(error)


def _is_raised_here(error: Exception) -> bool:
    """Whether a `raise` of this package raised it: what a library or the interpreter finds fault with is a bug."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or not str(place.tb_frame.f_globals.get("__name__")).startswith(f"{_PACKAGE}."):
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _in_options(message: str) -> str:
    """A message of the package, which names Python arguments, in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = re.sub(argument, option, message)
    return message


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _complain(message: str) -> None:
    typer.echo(f"{PROGRAM}: {message}", err=True)


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Make SIGTERM unwind the stack like Ctrl-C, so that temporary files are removed."""

    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # signals belong to the main thread; elsewhere they stay as they are
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
