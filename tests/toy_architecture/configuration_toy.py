from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    hidden_size: int = 6
    patch_size: int = 4
    image_size: int = 16
    num_channels: int = 3
    keep_ratio: float | int = 0.5
    num_clusters: int | None = None
    semantic_loss_ignore_index: int = 255

    def current(self) -> "ToyConfig":
        return self

    @contextmanager
    def overridden(self, **settings: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @property
    def grid_size(self) -> tuple[Any, Any]:
        return self.image_size // self.patch_size, self.image_size // self.patch_size


__all__ = ["ToyConfig"]
