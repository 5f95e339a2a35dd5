"""The table of architectures, and their registration with transformers' Auto classes.

Registration waits for transformers: its Auto classes are told when their modules are imported, at once if they already
are. So `import ailurus_hf` imports neither transformers nor torch, and the order of the two imports does not matter.

The models are registered as proxies that import their class on first use. transformers imports its Auto classes in the
middle of others that the models are built from (`modeling_layers`), when no model can be imported yet.
"""

from functools import partial
from typing import Any

from wrapt import lazy_import, register_post_import_hook

from .architectures.ailurus import AILURUS
from .architectures.ailurus_segformer import AILURUS_SEGFORMER
from .architectures.lookupvit import LOOKUPVIT
from .architectures.row import Architecture

__all__ = ["ARCHITECTURES", "architecture_of", "has_architecture", "register_architecture"]

ARCHITECTURES: dict[str, Architecture] = {}  # by model_type


def has_architecture(config: Any) -> bool:
    """Whether this is the configuration of a model in the table; any object may be asked."""
    return getattr(config, "model_type", None) in ARCHITECTURES


def architecture_of(config: Any) -> Architecture:
    """The row of a configuration, found by its `model_type`: code that came with a checkpoint has classes of its own.

    Raises:
        TypeError: it is of another model.
    """
    if not has_architecture(config):
        raise TypeError(
            f"config must have the model_type {' or '.join(map(repr, ARCHITECTURES))}, got {type(config).__name__} "
            f"with {getattr(config, 'model_type', None)!r}; load a model of this package"
        )
    return ARCHITECTURES[config.model_type]


def register_architecture(row: Architecture) -> None:
    """Add a row to the table and make transformers' Auto classes know its classes."""
    ARCHITECTURES[row.model_type] = row
    for module, register in (
        ("configuration_auto", _register_config),
        ("image_processing_auto", _register_image_processor),
        ("modeling_auto", _register_models),
    ):
        register_post_import_hook(partial(register, row), f"transformers.models.auto.{module}")


def _register_config(row: Architecture, module: Any) -> None:
    module.AutoConfig.register(row.model_type, row.load("AutoConfig"))


def _register_image_processor(row: Architecture, module: Any) -> None:
    processors = {"pil": row.load("AutoImageProcessor")}
    module.AutoImageProcessor.register(row.load("AutoConfig"), image_processor_classes=processors)


def _register_models(row: Architecture, module: Any) -> None:
    config_class = row.load("AutoConfig")
    for auto_class in row.models.values():
        # Not `AutoModel.register`, which looks into the class.
        models = getattr(module, auto_class)._model_mapping
        models.register(config_class, lazy_import(*row.classes[auto_class].split(":"), interface=type))


for _row in (AILURUS, AILURUS_SEGFORMER, LOOKUPVIT):
    register_architecture(_row)
