"""Registers the models with transformers' auto classes: the one place that does."""

from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)

# The top-level name is a placeholder that raises in transformers 5.17 without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .modeling.configuration_ailurus import AiluRusConfig
from .modeling.configuration_ailurus_segformer import AiluRusSegformerConfig
from .modeling.image_processing_ailurus import AiluRusImageProcessor
from .modeling.modeling_ailurus import (
    AiluRusBackbone,
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusModel,
)
from .modeling.modeling_ailurus_segformer import (
    AiluRusSegformerBackbone,
    AiluRusSegformerForSemanticSegmentation,
    AiluRusSegformerModel,
)

# Per configuration class: auto class -> model class. `ailurus_hf.hub` writes the same table into exported checkpoints.
AUTO_MODELS: dict[type[Any], dict[type[Any], type[Any]]] = {
    AiluRusConfig: {
        AutoModel: AiluRusModel,
        AutoBackbone: AiluRusBackbone,
        AutoModelForSemanticSegmentation: AiluRusForSemanticSegmentation,
        AutoModelForImageClassification: AiluRusForImageClassification,
    },
    AiluRusSegformerConfig: {
        AutoModel: AiluRusSegformerModel,
        AutoBackbone: AiluRusSegformerBackbone,
        AutoModelForSemanticSegmentation: AiluRusSegformerForSemanticSegmentation,
    },
}

for config_class, models in AUTO_MODELS.items():
    AutoConfig.register(config_class.model_type, config_class)
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": AiluRusImageProcessor})
    for auto_class, model_class in models.items():
        auto_class.register(config_class, model_class)
