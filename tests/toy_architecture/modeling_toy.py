from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_toy import ToyConfig


@dataclass
class ToyOutput(SemanticSegmenterOutput):
    assignment: Tensor | None = None


class ToyPreTrainedModel(PreTrainedModel):
    config: ToyConfig
    base_model_prefix = "toy"
    main_input_name = "pixel_values"


class ToyModel(ToyPreTrainedModel):
    """Averages runs of consecutive patches, and passes the means through one layer."""

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        tokens = self.patches(pixel_values).flatten(2).mT
        groups = F.one_hot(self.groups(tokens), self.num_kept(tokens)).to(tokens.dtype)
        means = groups.mT @ tokens / groups.sum(0)[:, None]
        return BaseModelOutput(last_hidden_state=groups @ self.layer(means))

    def num_kept(self, tokens: Tensor) -> int:
        return max(int(self.config.keep_ratio * tokens.shape[1] + 0.5), 1)

    def groups(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        return torch.arange(count, device=tokens.device) * self.num_kept(tokens) // count


class ToyForSemanticSegmentation(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ToyOutput:
        tokens = self.toy(pixel_values).last_hidden_state
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        logits = self.classifier(tokens).mT.unflatten(2, (rows, columns))
        logits = F.interpolate(logits, size=pixel_values.shape[-2:])
        return ToyOutput(logits=logits, assignment=self.toy.groups(tokens).expand(len(tokens), -1))


__all__ = ["ToyForSemanticSegmentation", "ToyModel", "ToyPreTrainedModel"]
