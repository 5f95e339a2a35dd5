"""AiluRus: adaptive resolution for dense-prediction vision transformers, compatible with Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registry import ARCHITECTURES  # after `import ailurus_hf`, transformers' Auto classes know the models

__version__ = "0.1.0"

_PUBLIC = {  # name -> its module
    "LookupViTVideoProcessor": "ailurus_hf.modeling.video_processing_lookupvit",
    "apply_ailurus": "ailurus_hf.adapters",
    "convert_checkpoint": "ailurus_hf.conversion",
    "remove_ailurus": "ailurus_hf.adapters",
    "register_grouping": "ailurus_hf.modeling.reduction",
    "restore": "ailurus_hf.unfolding",
    "save_with_code": "ailurus_hf.hub",
    "supported_families": "ailurus_hf.adapters",
    "with_budget": "ailurus_hf.budget",
}
for _row in ARCHITECTURES.values():
    for _path in _row.classes.values():
        _module, _, _name = _path.partition(":")
        _PUBLIC[_name] = _module

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
    from .modeling.configuration_lookupvit import LookupViTConfig as LookupViTConfig
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
    from .modeling.modeling_lookupvit import LookupViTBackbone as LookupViTBackbone
    from .modeling.modeling_lookupvit import LookupViTForImageClassification as LookupViTForImageClassification
    from .modeling.modeling_lookupvit import LookupViTForSemanticSegmentation as LookupViTForSemanticSegmentation
    from .modeling.modeling_lookupvit import LookupViTForVideoClassification as LookupViTForVideoClassification
    from .modeling.modeling_lookupvit import LookupViTModel as LookupViTModel
    from .modeling.reduction import register_grouping as register_grouping
    from .modeling.video_processing_lookupvit import LookupViTVideoProcessor as LookupViTVideoProcessor
    from .unfolding import restore as restore


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
