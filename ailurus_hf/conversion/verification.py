"""The last step of a conversion: the written folder is loaded again and its logits are compared with the source's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .reading import CheckpointError, read_safetensors
from .recipe import Plan, SourceCheckpoint

__all__ = ["Verification", "quiet_transformers", "verify_checkpoint"]

TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5
RECORDED = "golden.safetensors"


@dataclass(frozen=True)
class Verification:
    """What a converted model was compared with, and the largest absolute difference of the logits."""

    against: str
    largest_difference: float


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and remarks: a conversion reports in its own words."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def verify_checkpoint(
    folder: Path, plan: Plan, checkpoint: SourceCheckpoint, tensors: Mapping[str, torch.Tensor]
) -> Verification:
    """Load a written folder and compare it with what was meant to be written, and with the source's own logits.

    Nothing is merged in the comparison (`keep_ratio=1`), and it runs in float32 or above on the values that were saved.

    Args:
        folder: the folder written.
        plan: the recipe's plan.
        checkpoint: the source.
        tensors: the tensors that were to be saved, by name.

    Raises:
        CheckpointError: the loaded model differs from the source.
    """
    saved_dtype = next(iter(tensors.values())).dtype
    dtype = torch.promote_types(saved_dtype, torch.float32)
    model = _load(folder, plan, tensors, dtype)
    cases = []
    if plan.reference is not None:
        source = {name: tensor.to(saved_dtype).to(dtype) for name, tensor in checkpoint.tensors.items()}
        cases += [
            ("the source's formulas", image, plan.reference(source, image)) for image in _test_images(model, dtype)
        ]
    recorded = _recorded(checkpoint.weights_path.parent / RECORDED)
    if recorded is not None and saved_dtype == dtype:
        cases.append((f"the recorded logits of {RECORDED}", recorded[0].to(dtype), recorded[1]))
    if not cases:
        return Verification("the tensors meant to be saved", 0.0)
    largest = max(_difference(model, image, logits, against) for against, image, logits in cases)
    return Verification(" and ".join(dict.fromkeys(against for against, _, _ in cases)), largest)


def _load(folder: Path, plan: Plan, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model_class = getattr(import_module(__package__.rpartition(".")[0]), plan.model_class)
    model: PreTrainedModel = model_class.from_pretrained(folder, dtype=dtype, keep_ratio=1.0, num_clusters=None)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, tensors[name].to(tensor.dtype)):
            raise CheckpointError(
                f"verification failed: {name} does not come back from the written folder as it was saved"
            )
    return model


def _test_images(model: PreTrainedModel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two seeded images: one of the trained size, and one smaller, not square and not a multiple of the patch size."""
    config = model.config
    height, width = (side * config.patch_size for side in config.grid_size)
    smaller = max(config.patch_size, 3 * height // 5 + 1), max(config.patch_size, 9 * width // 10 + 1)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, config.num_channels, *size, generator=generator).to(dtype) for size in ((height, width), smaller)
    ]


def _recorded(path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not path.is_file():
        return None
    golden = read_safetensors(path)
    return (golden["pixel_values"], golden["logits"]) if {"pixel_values", "logits"} <= golden.keys() else None


def _difference(model: PreTrainedModel, pixel_values: torch.Tensor, expected: torch.Tensor, against: str) -> float:
    logits = model(pixel_values=pixel_values).logits
    if logits.shape != expected.shape:
        raise CheckpointError(
            f"verification failed: the logits have shape {tuple(logits.shape)}, {against} give {tuple(expected.shape)}"
        )
    difference = float((logits - expected).abs().max())
    allowed = TOLERANCE + RELATIVE_TOLERANCE * float(expected.abs().max())
    if not difference <= allowed:
        raise CheckpointError(
            f"verification failed: the logits differ from {against} by {difference:.2g}, allowed {allowed:.2g}; "
            "nothing was written (--no-verify converts all the same)"
        )
    return difference
