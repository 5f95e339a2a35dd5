"""The command line `ailurus-hf`: one small file per subcommand. Only their bodies import torch and transformers."""

import sys
from collections.abc import Sequence

from ..utils.extras import needs_extra


def main(arguments: Sequence[str] | None = None) -> int:
    """`app.main`, or a line on stderr and 2 where the packages of the extra `cli` are not installed."""
    try:
        with needs_extra("cli", "the commands"):
            import rich  # noqa: F401
            import typer  # noqa: F401
    except ImportError as error:
        print(f"ailurus-hf: error: {error}", file=sys.stderr)
        return 2
    from .app import main as run

    return run(arguments)
