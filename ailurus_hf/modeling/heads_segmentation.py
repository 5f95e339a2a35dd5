"""Heads that turn tokens or feature maps into logits of classes: Segmenter's, SETR's and SegFormer's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_ailurus import AiluRusConfig
from .configuration_ailurus_segformer import AiluRusSegformerConfig
from .label_maps import binary_cross_entropy
from .layers_ailurus import AiluRusLayer, LayerShape, map_to_tokens, tokens_to_map


def segmentation_loss(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """The model's loss of logits (batch_size, num_labels, height, width) and labels (batch_size, height, width) int64,
    without the pixels labelled `config.semantic_loss_ignore_index`.

    Cross entropy; with one channel binary cross entropy, as transformers' SegFormer has it: the sum over the pixels
    that count, over the number of all pixels.

    Raises:
        ValueError: the labels have another size, or with one channel other values than 0 and 1.
    """
    expected = (logits.shape[0], *logits.shape[-2:])
    if labels.shape != expected:
        raise ValueError(f"labels must be (batch_size, height, width) = {expected}, got {tuple(labels.shape)}")
    if model.config.num_labels == 1:
        return binary_cross_entropy(logits, labels, model.config.semantic_loss_ignore_index)[0].mean()
    loss: Tensor = model.loss_function(logits, labels, ignore_index=model.config.semantic_loss_ignore_index)
    return loss


class AiluRusLinearHead(nn.Module):
    """Segmenter's linear decoder: one linear layer on each patch token."""

    def __init__(self, config: AiluRusConfig):
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (batch_size, N, hidden_size) -> logits (batch_size, num_labels, rows, columns)."""
        return self.classifier(patches).transpose(1, 2).unflatten(2, grid)


class AiluRusMaskTransformerHead(nn.Module):
    """Segmenter's mask transformer (arXiv 2105.05633, section 3.2).

    Class tokens join the patch tokens in a few transformer layers; the logit of a patch for a class is the cosine of
    the two, normalised over classes.
    """

    def __init__(self, config: AiluRusConfig):
        super().__init__()
        if config.num_labels < 2:
            raise ValueError(
                "num_labels must be at least 2 for decode_head.type='mask_transformer', which normalises over the "
                f"classes, got {config.num_labels}; set num_labels=2, or decode_head.type='linear'"
            )
        head = config.decode_head
        size = head.hidden_size or config.hidden_size
        shape = LayerShape(
            hidden_size=size,
            # One head per 64 channels, whatever the encoder has: the original's rule.
            num_attention_heads=head.num_attention_heads or max(size // 64, 1),
            intermediate_size=head.intermediate_size or 4 * size,
            layer_norm_eps=head.layer_norm_eps or config.layer_norm_eps,
            dropout=head.dropout_prob,
        )
        if size % shape.num_attention_heads:
            raise ValueError(
                f"decode_head.hidden_size must be a multiple of its num_attention_heads={shape.num_attention_heads}, "
                f"got {size}"
            )
        self.projection = nn.Linear(config.hidden_size, size)
        self.class_tokens = nn.Parameter(torch.zeros(1, config.num_labels, size))
        self.layers = nn.ModuleList(AiluRusLayer(config, shape) for _ in range(head.num_layers))
        self.layernorm = nn.LayerNorm(size, eps=shape.layer_norm_eps)
        self.patch_projection = nn.Linear(size, size, bias=False)
        self.class_projection = nn.Linear(size, size, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=shape.layer_norm_eps)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (batch_size, N, hidden_size) -> logits (batch_size, num_labels, rows, columns)."""
        num_patches = patches.shape[1]
        class_tokens = self.class_tokens.expand(patches.shape[0], -1, -1)
        hidden_states = torch.cat([self.projection(patches), class_tokens], dim=1)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states)
        hidden_states = self.layernorm(hidden_states)
        patches = F.normalize(self.patch_projection(hidden_states[:, :num_patches]), dim=-1)
        classes = F.normalize(self.class_projection(hidden_states[:, num_patches:]), dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2)).transpose(1, 2).unflatten(2, grid)


class AiluRusProgressiveUpsamplingHead(nn.Module):
    """SETR's decoders by upsampling (arXiv 2012.15840, section 3.2).

    Convolutions alternate with bilinear upsampling: four 3 x 3 ones and factor 2 are progressive upsampling (PUP), a
    single 1 x 1 one is the naive decoder.
    """

    def __init__(self, config: AiluRusConfig):
        super().__init__()
        head = config.decode_head
        size, kernel = head.hidden_size or config.hidden_size, head.kernel_size
        widths = [config.hidden_size] + [size] * (head.num_layers - 1)
        self.upscale = head.upscale
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=head.layer_norm_eps or config.layer_norm_eps)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, size, kernel, padding=kernel // 2, bias=False) for width in widths
        )
        self.batch_norms = nn.ModuleList(nn.BatchNorm2d(size) for _ in widths)
        self.dropout = nn.Dropout2d(head.dropout_prob)
        self.classifier = nn.Conv2d(size, config.num_labels, 1)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (batch_size, N, hidden_size) -> logits (batch_size, num_labels, rows', columns'), each side of
        the grid times `decoder_upscale` per convolution."""
        maps = self.layernorm(patches).transpose(1, 2).unflatten(2, grid)
        for convolution, batch_norm in zip(self.convolutions, self.batch_norms, strict=True):
            maps = F.relu(batch_norm(convolution(maps)))
            size = (maps.shape[2] * self.upscale, maps.shape[3] * self.upscale)
            maps = F.interpolate(maps, size=size, mode="bilinear")
        return self.classifier(self.dropout(maps))


class AiluRusSegformerProjection(nn.Module):
    """Brings one stage's feature map to the width of the head: a linear layer, with batch norm and ReLU in "conv"."""

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        with_norm = config.decoder_type == "conv"
        self.proj = nn.Linear(config.hidden_sizes[stage], config.decoder_hidden_size, bias=not with_norm)
        self.batch_norm = nn.BatchNorm2d(config.decoder_hidden_size, eps=config.batch_norm_eps) if with_norm else None

    def forward(self, feature_map: Tensor, fusion: Tensor) -> Tensor:
        """This stage's summand of the fused map, on the stage's own grid.

        Args:
            feature_map: (batch_size, channels, rows, columns).
            fusion: (decoder_hidden_size, decoder_hidden_size), the fusing layer's columns for this stage.

        Returns:
            (batch_size, decoder_hidden_size, rows, columns).
        """
        tokens, grid = map_to_tokens(feature_map).contiguous(), (feature_map.shape[2], feature_map.shape[3])
        if self.batch_norm is None:
            # Two linear layers in a row are one, with far fewer operations: the input is the narrow side.
            return tokens_to_map(F.linear(tokens, fusion @ self.proj.weight, fusion @ self.proj.bias), grid)
        hidden = F.relu(self.batch_norm(tokens_to_map(self.proj(tokens), grid)), inplace=True)
        return tokens_to_map(F.linear(map_to_tokens(hidden), fusion), grid)


class AiluRusSegformerDecodeHead(nn.Module):
    """SegFormer's all-MLP head, in two versions, see `config.decoder_type`.

    Written in the papers' order, all stages are resized to the first one's grid, concatenated, and fused by a linear
    layer on the widest tensor of the model. Resizing and a linear layer commute, since one acts on positions and the
    other on channels. So each stage is fused on its own grid here, and the results are resized and summed: the same
    logits to rounding, with a fraction of the operations.

    The columns of the fusing layer belong to the last stage first in "linear", to the first stage first in "conv".
    """

    def __init__(self, config: AiluRusSegformerConfig):
        super().__init__()
        num_stages, size = len(config.depths), config.decoder_hidden_size
        self.last_stage_first = config.decoder_type == "linear"
        self.linear_projections = nn.ModuleList(AiluRusSegformerProjection(config, i) for i in range(num_stages))
        self.linear_fuse = nn.Conv2d(num_stages * size, size, kernel_size=1, bias=False)
        self.batch_norm = nn.BatchNorm2d(size, eps=config.batch_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(size, config.num_labels, kernel_size=1)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Feature maps of all stages -> logits (batch_size, num_labels, rows, columns) on the first stage's grid."""
        fusion = self.linear_fuse.weight[:, :, 0, 0].unflatten(1, (len(feature_maps), -1))
        if self.last_stage_first:
            fusion = fusion.flip(1)
        size = feature_maps[0].shape[-2:]
        stages = enumerate(zip(self.linear_projections, feature_maps, strict=True))
        summands = [projection(feature_map, fusion[:, index]) for index, (projection, feature_map) in stages]
        fused = summands[0]
        for summand in summands[1:]:
            # In place, as the ReLU below: these are the model's largest tensors, and fresh memory for them is slow.
            fused = fused.add_(F.interpolate(summand, size=size, mode="bilinear", align_corners=False))
        return self.classifier(self.dropout(F.relu(self.batch_norm(fused), inplace=True)))


HEADS: dict[str, type[nn.Module]] = {
    "linear": AiluRusLinearHead,
    "mask_transformer": AiluRusMaskTransformerHead,
    "progressive_upsampling": AiluRusProgressiveUpsamplingHead,
}
