"""transformers' own image processors: what a `preprocessor_config.json` means to the class that it is for."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.image_processing_backends import PilBackend

from ...utils.errors import CheckpointError
from ..reading.sources import PROCESSOR_FIELDS, read_json_beside
from ..recipe import Pictures

__all__ = ["native_pictures"]

# model_type -> what the names of its processor's classes begin with; the others have ViT's
PROCESSORS: Mapping[str, str] = {
    "segformer": "Segformer",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
}


def native_pictures(weights: Path, model_type: str) -> Pictures | None:
    """Settings of the processor beside the weights, with the defaults of its class where the file leaves them out.

    Args:
        weights: the weights' file.
        model_type: of the model, which tells the class where the file does not.

    Returns:
        `None` where there is no `preprocessor_config.json`.

    Raises:
        CheckpointError: the file is unreadable, or its settings are not valid.
    """
    stored = read_json_beside(weights, "preprocessor_config.json")
    if not stored:
        return None
    native_class = _native_class(stored, model_type)
    settings = {name: value for name, value in stored.items() if name in PROCESSOR_FIELDS}
    if "reduce_labels" in stored:  # the name that `do_reduce_labels` had before
        settings.setdefault("do_reduce_labels", stored["reduce_labels"])
    try:
        native = native_class(**settings)
        resolved = native.to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"preprocessor_config.json is not valid: {' '.join(str(error).split())}") from error
    # Some classes leave steps out, whatever the file says of them.
    used = inspect.signature(native._preprocess).parameters
    ours = {name: resolved[name] for name in PROCESSOR_FIELDS if name in used and resolved.get(name) is not None}

    def preprocess(picture: torch.Tensor) -> torch.Tensor:
        pixel_values: torch.Tensor = native(picture, return_tensors="pt")["pixel_values"]
        return pixel_values

    return Pictures(ours, preprocess=preprocess)


def _native_class(stored: Mapping[str, Any], model_type: str) -> type[PilBackend]:
    """The class without torchvision, as ours is; only classes of transformers itself."""
    named = str(stored.get("image_processor_type") or stored.get("feature_extractor_type"))
    family = named.removesuffix("Fast").removesuffix("FeatureExtractor").removesuffix("ImageProcessor")
    for name in (family, PROCESSORS.get(model_type, "ViT")):
        native = getattr(transformers, f"{name}ImageProcessorPil", None)
        if isinstance(native, type) and issubclass(native, PilBackend):
            return native
    raise RuntimeError(f"transformers has no image processor for {model_type}")
