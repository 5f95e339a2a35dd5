"""The last step of a conversion: the written folder is loaded again and compared with the source.

From pixel values to the output, and from a picture to the output by way of the written image processor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.image_processing_ailurus import AiluRusImageProcessor
from ..utils.errors import CheckpointError
from .reading.files import read_safetensors
from .reading.sources import RECORDED
from .recipe import Plan, SourceCheckpoint

__all__ = ["Verification", "float_dtype", "verify_checkpoint"]

# The same formulas in another order of operations differ in float32's last digits, more where outputs are large. The
# smallest mistakes that a recipe can make, a wrong epsilon or way of resizing, are far above.
TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-5
FROM_PICTURE = "the whole way from a picture"


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
        CheckpointError: the loaded model, or its image processor, differs from the source.
    """
    saved_dtype = float_dtype(tensors)
    dtype = torch.promote_types(saved_dtype, torch.float32)
    model = _load(folder, plan, tensors, dtype)
    cases: list[_Case] = []
    # rounded as the saved weights are, so that only the computation is compared, not the loss of digits
    source = {name: tensor.to(saved_dtype).to(dtype) for name, tensor in checkpoint.tensors.items()}
    if plan.reference is not None:
        cases += [
            _Case("the source's formulas", image, plan.output, plan.reference(source, _turned(image, plan)))
            for image in _test_images(model, plan, dtype)
        ]
    cases += _from_picture(folder, model.config, plan, source, dtype)
    if saved_dtype == dtype:  # recorded outputs are those of unrounded weights
        cases += _recorded(checkpoint.weights_path.parent / RECORDED, plan, dtype)
    if not cases:
        return Verification("the tensors meant to be saved", 0.0)
    try:
        largest = max(_difference(model, case) for case in cases)
    except CheckpointError as error:
        raise CheckpointError("; ".join([str(error), *plan.assumptions])) from error
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


def _turned(pixel_values: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Pixel values in the source's order of channels -> in ours, and the other way round."""
    return pixel_values.flip(1) if plan.bgr else pixel_values


def _from_picture(
    folder: Path, config: Any, plan: Plan, source: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> list[_Case]:
    """The source's preprocessing and forward of a picture, against the written image processor's.

    Raises:
        CheckpointError: the pixel values differ.
    """
    if plan.preprocess is None or config.num_channels != 3:  # a picture has three channels
        return []
    sizes = plan.image_sizes or _plain_vit_sizes(config, plan)
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (3, *sizes[0]), generator=generator, dtype=torch.uint8)
    theirs = plan.preprocess(picture)
    found = AiluRusImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    _compare(_turned(found, plan), theirs, "pixel values of a picture", "the source's own preprocessing")
    height, width = theirs.shape[-2:]
    patch = config.patch_size
    # Of other sizes the source's model makes something else, or nothing; they are compared as far as here.
    fits = plan.image_sizes or plan.pads_images or (height % patch == 0 and width % patch == 0)
    fits = fits and min(height, width) >= getattr(config, "min_image_size", 1)
    if plan.reference is None or not fits or not (plan.resizes or (height, width) == sizes[0]):
        return []
    expected = plan.reference(source, theirs.to(dtype))
    return [_Case(FROM_PICTURE, found.to(dtype), plan.output, expected)]


def _recorded(path: Path, plan: Plan, dtype: torch.dtype) -> list[_Case]:
    """Outputs recorded beside the source, at the trained size and, with the prefix `resized_`, at another."""
    if not path.is_file():
        return []
    golden = read_safetensors(path)
    return [
        _Case(
            f"the recorded {name} of {RECORDED}",
            _turned(golden[f"{prefix}pixel_values"], plan).to(dtype),
            output,
            expected,
        )
        for prefix in ("", "resized_")
        for name, output in plan.recorded.items()
        if f"{prefix}pixel_values" in golden and (expected := golden.get(f"{prefix}{name}")) is not None
    ]


def _difference(model: PreTrainedModel, case: _Case) -> float:
    found = model(pixel_values=case.pixel_values)[case.output]
    return _compare(found, case.expected, case.output, case.against)


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str, against: str) -> float:
    if found.shape != expected.shape:
        raise CheckpointError(
            f"verification failed: the {what} have shape {tuple(found.shape)}, {against} give {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE + RELATIVE_TOLERANCE * float(expected.abs().max())
    if not difference <= allowed:  # true for NaN too, which no comparison finds
        raise CheckpointError(
            f"verification failed: the {what} differ from {against} by {difference:.2g}, "
            f"allowed {allowed:.2g}; nothing was written (--no-verify converts all the same)"
        )
    return difference
