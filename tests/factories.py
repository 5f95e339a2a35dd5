"""Tiny configurations, models and images for the tests."""

from typing import Any

import torch

from ailurus_hf import AiluRusConfig


def tiny_config(**overrides: Any) -> AiluRusConfig:
    """4 layers of width 32 on patches of 8 pixels; trained grid 6 x 6."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "patch_size": 8,
        "image_size": 48,
        "num_labels": 5,
        "initializer_range": 0.2,  # random tokens must differ enough for clusters to mean something
    }
    return AiluRusConfig(**{**settings, **overrides})


def tiny_model(model_class: Any, seed: int = 0, **overrides: Any) -> Any:
    """A model with random weights, biases and norms included, in evaluation mode."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_images(batch_size: int = 2, height: int = 48, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Normalised pixel values (batch_size, 3, height, width)."""
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))
