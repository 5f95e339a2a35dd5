"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["ClusterLayer", "Device", "Dtype", "Json", "KeepRatio", "Model", "load_on_device", "load_processor"]

Model = Annotated[
    str, typer.Option("--model", metavar="PATH", help="Checkpoint folder, or a name on the Hub.", show_default=False)
]
KeepRatio = Annotated[
    float | None,
    typer.Option(help="Share of tokens to keep, above 0 and at most 1; 1 merges nothing.", show_default="the model's"),
]
ClusterLayer = Annotated[
    int | None,
    typer.Option(help="Layers that run on all tokens before they are clustered.", show_default="the model's"),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the checkpoint's")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DTYPES = ("float32", "bfloat16", "float16")


def load_on_device(model: str, device: str, dtype: str | None, **settings: Any) -> "PreTrainedModel":
    """Load a segmentation checkpoint strictly and move it to the device.

    Raises:
        ValueError: `device` or `dtype` is unknown or not available here.
    """
    from .loading import load_model

    target = _device(device)
    return load_model(model, dtype=_dtype(dtype), **settings).to(target)


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
        chosen: torch.device = PartialState().device
        return chosen
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available here; try --device auto or cpu") from error
    return device


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
