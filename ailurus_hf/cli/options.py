"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..utils.errors import CheckpointError
from ..utils.files import read_json_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


MAX_SIDE = 16_384  # pixels that an image processor may enlarge a picture to


def parse_output(text: str | Path) -> Path:
    """The path of an output; an empty one would be the folder that one happens to be in."""
    if not str(text).strip():
        raise typer.BadParameter("an output must have a name, got an empty one")
    return Path(text)


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

    target = find_device(device)
    return load_model(model, dtype=dtype, **settings).to(target)


def load_processor(model: str) -> Any:
    """The checkpoint's image processor; the default one where it has none."""
    from .. import AiluRusImageProcessor
    from .loading import adapter_base

    folder = Path(model)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        if (base := adapter_base(folder)) is not None:
            return load_processor(base)
        typer.echo(
            f"ailurus-hf: warning: {model} has no preprocessor_config.json; using the default settings", err=True
        )
        return AiluRusImageProcessor()
    if folder.is_dir():
        read_json_object(folder / "preprocessor_config.json", "an image processor's settings", CheckpointError)
    try:
        processor = AiluRusImageProcessor.from_pretrained(model)
        _check_processor(processor)
    except OSError:
        raise
    except Exception as error:  # whatever a setting makes of the code that takes it
        raise CheckpointError(f"{model}: preprocessor_config.json is not valid: {error}") from error
    return processor


def _check_processor(processor: Any) -> None:
    """Prepare a picture of 16 x 16 pixels; sizes that no memory holds are refused before."""
    import torch

    size = processor.size or {}
    sides = [side for _, side in (size.items() if hasattr(size, "items") else vars(size).items()) if side is not None]
    if processor.do_resize and any(side > MAX_SIDE for side in sides):
        raise ValueError(f"size must be at most {MAX_SIDE} pixels along each side, got {max(sides)}")
    processor(torch.zeros(3, 16, 16, dtype=torch.uint8), return_tensors="pt")


def find_device(name: str) -> "torch.device":
    import torch

    from ..utils.extras import needs_extra

    with needs_extra("cli", "the commands"):
        from accelerate import PartialState
    if name == "auto":
        return PartialState().device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available here; try --device auto or cpu") from error
    return device
