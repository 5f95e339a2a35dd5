"""AiluRus: adaptive resolution for dense-prediction vision transformers, compatible with Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import auto as _auto  # noqa: F401  registers the models: after `import ailurus_hf`, AutoModel knows them

__version__ = "0.1.0"

_PUBLIC = {
    "AiluRusBackbone": "modeling.modeling_ailurus",
    "AiluRusConfig": "modeling.configuration_ailurus",
    "AiluRusForImageClassification": "modeling.modeling_ailurus",
    "AiluRusForSemanticSegmentation": "modeling.modeling_ailurus",
    "AiluRusImageProcessor": "modeling.image_processing_ailurus",
    "AiluRusModel": "modeling.modeling_ailurus",
    "AiluRusSegformerBackbone": "modeling.modeling_ailurus_segformer",
    "AiluRusSegformerConfig": "modeling.configuration_ailurus_segformer",
    "AiluRusSegformerForSemanticSegmentation": "modeling.modeling_ailurus_segformer",
    "AiluRusSegformerModel": "modeling.modeling_ailurus_segformer",
    "apply_ailurus": "adapters",
    "convert_checkpoint": "conversion",
    "remove_ailurus": "adapters",
    "save_with_code": "hub",
    "register_grouping": "modeling.reduction",
    "supported_families": "adapters",
    "with_budget": "budget",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .adapters import apply_ailurus as apply_ailurus
    from .adapters import remove_ailurus as remove_ailurus
    from .adapters import supported_families as supported_families
    from .budget import with_budget as with_budget
    from .conversion import convert_checkpoint as convert_checkpoint
    from .hub.remote_code import save_with_code as save_with_code
    from .modeling.configuration_ailurus import AiluRusConfig as AiluRusConfig
    from .modeling.configuration_ailurus_segformer import AiluRusSegformerConfig as AiluRusSegformerConfig
    from .modeling.image_processing_ailurus import AiluRusImageProcessor as AiluRusImageProcessor
    from .modeling.modeling_ailurus import AiluRusBackbone as AiluRusBackbone
    from .modeling.modeling_ailurus import AiluRusForImageClassification as AiluRusForImageClassification
    from .modeling.modeling_ailurus import AiluRusForSemanticSegmentation as AiluRusForSemanticSegmentation
    from .modeling.modeling_ailurus import AiluRusModel as AiluRusModel
    from .modeling.modeling_ailurus_segformer import AiluRusSegformerBackbone as AiluRusSegformerBackbone
    from .modeling.modeling_ailurus_segformer import (
        AiluRusSegformerForSemanticSegmentation as AiluRusSegformerForSemanticSegmentation,
    )
    from .modeling.modeling_ailurus_segformer import AiluRusSegformerModel as AiluRusSegformerModel
    from .modeling.reduction import register_grouping as register_grouping


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
