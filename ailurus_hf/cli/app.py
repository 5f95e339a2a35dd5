"""`ailurus-hf`: the subcommands, and how their errors reach the user.

A user's mistake is one line on stderr and exit code 2. An interruption is one line and exit code 130. Anything else is
a bug and keeps its traceback.
"""

import signal
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
    try:
        with _terminate_like_interrupt():
            code = command.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = _user_mistake(error)
        if message is None:
            raise
        _complain(f"error: {message}")
        return 2
    if code == 130:  # typer turns KeyboardInterrupt into this code
        _complain("interrupted; nothing half-written was left behind")
    return code if isinstance(code, int) else 0


def _user_mistake(error: Exception) -> str | None:
    """The line that explains a user's mistake, or `None` for what must keep its traceback."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if hasattr(error, "format_message"):  # typer's usage errors
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _one_line(error.format_message()) + hint
    if isinstance(error, ValueError | TypeError | OSError | ImportError | StrictDataclassError | SafetensorError):
        return _one_line(str(error)) or type(error).__name__
    return None


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
