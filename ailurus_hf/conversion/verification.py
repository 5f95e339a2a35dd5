"""The last step of a conversion: the written folder is loaded again and its output is compared with the source's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..utils.errors import CheckpointError
from .reading.files import read_safetensors
from .reading.sources import RECORDED
from .recipe import Plan, SourceCheckpoint

__all__ = ["Verification", "float_dtype", "verify_checkpoint"]

# The same formulas in another order of operations differ in float32's last digits, more where outputs are large. The
# smallest mistakes that a recipe can make, a wrong epsilon or way of resizing, are far above.
TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """What a converted model was compared with, and the largest absolute difference of what it computes."""

    against: str
    largest_difference: float


@dataclass(frozen=True)
class _Case:
    """One comparison: the model's output of this name for these pixels must be `expected`."""

    against: str
    pixel_values: torch.Tensor
    output: str
    expected: torch.Tensor


def float_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype that a checkpoint's weights share; counters are whole numbers."""
    return next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())


@torch.no_grad()
def verify_checkpoint(
    folder: Path, plan: Plan, checkpoint: SourceCheckpoint, tensors: Mapping[str, torch.Tensor]
) -> Verification:
    """Load a written folder and compare it with what was meant to be written, and with the source's own outputs.

    Nothing is merged in the comparison (`keep_ratio=1`), and it runs in float32 or above on the values that were saved.

    Args:
        folder: the folder written.
        plan: the recipe's plan.
        checkpoint: the source.
        tensors: the tensors that were to be saved, by name.

    Raises:
        CheckpointError: the loaded model differs from the source.
    """
    saved_dtype = float_dtype(tensors)
    dtype = torch.promote_types(saved_dtype, torch.float32)
    model = _load(folder, plan, tensors, dtype)
    cases: list[_Case] = []
    if plan.reference is not None:
        # rounded as the saved weights are, so that only the computation is compared, not the loss of digits
        source = {name: tensor.to(saved_dtype).to(dtype) for name, tensor in checkpoint.tensors.items()}
        cases += [
            _Case("the source's formulas", image, plan.output, plan.reference(source, image))
            for image in _test_images(model, plan, dtype)
        ]
    if saved_dtype == dtype:  # recorded outputs are those of unrounded weights
        cases += _recorded(checkpoint.weights_path.parent / RECORDED, plan, dtype)
    if not cases:
        return Verification("the tensors meant to be saved", 0.0)
    largest = max(_difference(model, case) for case in cases)
    return Verification(" and ".join(dict.fromkeys(case.against for case in cases)), largest)


def _load(folder: Path, plan: Plan, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = plan.model_class.from_pretrained(folder, dtype=dtype, keep_ratio=1.0, num_clusters=None)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, tensors[name].to(tensor.dtype)):
            raise CheckpointError(
                f"verification failed: {name} does not come back from the written folder as it was saved"
            )
    return model


def _test_images(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> list[torch.Tensor]:
    """Seeded images of the sizes that the plan names, else of the sizes of [`_plain_vit_sizes`]."""
    generator = torch.Generator().manual_seed(0)
    sizes = plan.image_sizes or _plain_vit_sizes(model.config, plan)
    return [torch.randn(1, model.config.num_channels, *size, generator=generator).to(dtype) for size in sizes]


def _plain_vit_sizes(config: Any, plan: Plan) -> tuple[tuple[int, int], ...]:
    """The trained size, and one smaller and not square.

    Where the source pads images as the models here do, the second is no whole number of patches either.
    """
    patch_size = config.patch_size
    height, width = (side * patch_size for side in config.grid_size)
    smaller = max(patch_size, 3 * height // 5 + 1), max(patch_size, 9 * width // 10 + 1)
    if not plan.pads_images:
        smaller = (smaller[0] // patch_size * patch_size, (smaller[1] // patch_size + 1) * patch_size)
    return ((height, width), smaller) if plan.resizes else ((height, width),)


def _recorded(path: Path, plan: Plan, dtype: torch.dtype) -> list[_Case]:
    """Outputs recorded beside the source, at the trained size and, with the prefix `resized_`, at another."""
    if not path.is_file():
        return []
    golden = read_safetensors(path)
    return [
        _Case(f"the recorded {name} of {RECORDED}", golden[f"{prefix}pixel_values"].to(dtype), output, expected)
        for prefix in ("", "resized_")
        for name, output in plan.recorded.items()
        if f"{prefix}pixel_values" in golden and (expected := golden.get(f"{prefix}{name}")) is not None
    ]


def _difference(model: PreTrainedModel, case: _Case) -> float:
    found, expected, against = model(pixel_values=case.pixel_values)[case.output], case.expected, case.against
    if found.shape != expected.shape:
        raise CheckpointError(
            f"verification failed: the {case.output} have shape {tuple(found.shape)}, "
            f"{against} give {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE + RELATIVE_TOLERANCE * float(expected.abs().max())
    if not difference <= allowed:  # true for NaN too, which no comparison finds
        raise CheckpointError(
            f"verification failed: the {case.output} differ from {against} by {difference:.2g}, "
            f"allowed {allowed:.2g}; nothing was written (--no-verify converts all the same)"
        )
    return difference
