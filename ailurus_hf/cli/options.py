"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Model = Annotated[str, typer.Option("--model", metavar="PATH", help="Checkpoint folder, or a name on the Hub.")]
KeepRatio = Annotated[
    float | None,
    typer.Option(help="Share of tokens to keep, above 0 and at most 1; 1 merges nothing.", show_default="the model's"),
]


def parse_size(text: str) -> int | tuple[int, ...]:
    """A compressed size from "5" or "5x7"."""
    try:
        sides = tuple(int(side) for side in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"a size is a number or several such as 5x7, got {text!r}") from None
    return sides[0] if len(sides) == 1 else sides


CompressedSize = Annotated[
    Any,
    typer.Option(
        parser=parse_size,
        metavar="SIZE",
        help="Grid of LookupViT's compressed tokens, such as 5 or 5x7.",
        show_default="the model's",
    ),
]
Grouping = Annotated[
    str | None,
    typer.Option(
        help="How tokens are grouped: region_merging, density_peaks (the paper's) or grid.", show_default="the model's"
    ),
]
ClusterLayer = Annotated[
    int | None,
    typer.Option(help="Layers that run on all tokens before they are grouped.", show_default="the model's"),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Type of the weights and of what is computed.", show_default="the checkpoint's"),
]
SlidingWindow = Annotated[
    bool, typer.Option("--sliding-window", help="Predict window by window, with the sizes the model was made for.")
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Go on past files that are damaged, no pictures or too small, and list them."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def load_on_device(model: str, device: str, dtype: str | None, **settings: Any) -> "PreTrainedModel":
    """Load a segmentation checkpoint strictly and move it to the device.

    Raises:
        ValueError: `device` is unknown or not available here.
    """
    from .loading import load_model

    target = _device(device)
    return load_model(model, dtype=dtype, **settings).to(target)


def load_processor(model: str) -> Any:
    """The checkpoint's image processor; the default one where it has none."""
    from .. import AiluRusImageProcessor

    folder = Path(model)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        typer.echo(
            f"ailurus-hf: warning: {model} has no preprocessor_config.json; using the default settings", err=True
        )
        return AiluRusImageProcessor()
    return AiluRusImageProcessor.from_pretrained(model)


def _device(name: str) -> "torch.device":
    import torch

    from ..utils.extras import needs_extra

    with needs_extra("cli", "the commands"):
        from accelerate import PartialState
    if name == "auto":
        return PartialState().device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available here; try --device auto or cpu") from error
    return device
