"""Tiny configurations, models and images for the tests."""

from typing import Any

import pytest
import torch

from ailurus_hf import AiluRusConfig, AiluRusSegformerConfig, LookupViTConfig


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


def tiny_segformer_config(**overrides: Any) -> AiluRusSegformerConfig:
    """Four stages of 2 to 3 blocks; an image of 64 x 64 makes grids of 16, 8, 4 and 2 tokens a side."""
    settings: dict[str, Any] = {
        "depths": (2, 3, 3, 2),
        "hidden_sizes": (16, 32, 48, 64),
        "num_attention_heads": (1, 2, 3, 4),
        "decoder_hidden_size": 24,
        "image_size": 64,
        "cluster_layer": 1,
        "num_labels": 5,
        "initializer_range": 0.2,
    }
    return AiluRusSegformerConfig(**{**settings, **overrides})


def tiny_segformer(model_class: Any, seed: int = 0, **overrides: Any) -> Any:
    """A hierarchical model with random weights, biases and norms and batch statistics included, in evaluation mode."""
    torch.manual_seed(seed)
    model = _with_random_vectors(model_class(tiny_segformer_config(**overrides)))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer) * 0.5)
    return model


def tiny_model(model_class: Any, seed: int = 0, **overrides: Any) -> Any:
    """A model with random weights, biases and norms included, in evaluation mode."""
    torch.manual_seed(seed)
    return _with_random_vectors(model_class(tiny_config(**overrides)))


def tiny_lookupvit_config(**overrides: Any) -> LookupViTConfig:
    """3 blocks of width 32 on patches of 8 pixels; trained grid 6 x 6, compressed sizes 2, 3 and 5."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 48,
        "compressed_size": 3,
        "compressed_sizes": (2, 3, 5),
        "num_labels": 5,
        "initializer_range": 0.2,
    }
    return LookupViTConfig(**{**settings, **overrides})


def tiny_lookupvit(model_class: Any, seed: int = 0, **overrides: Any) -> Any:
    """A LookupViT with random weights, biases and norms included, in evaluation mode."""
    torch.manual_seed(seed)
    return _with_random_vectors(model_class(tiny_lookupvit_config(**overrides)))


def random_videos(batch_size: int = 2, num_frames: int = 4, height: int = 48, width: int = 48) -> torch.Tensor:
    """Normalised pixel values (batch_size, num_frames, 3, height, width)."""
    return random_images(batch_size * num_frames, height, width).unflatten(0, (batch_size, num_frames))


def _with_random_vectors(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_images(batch_size: int = 2, height: int = 48, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Normalised pixel values (batch_size, 3, height, width)."""
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def slow(*values: Any) -> list[Any]:
    """Parameters of a test that only `make test-slow` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
