"""Plain vision transformer with adaptive resolution (AiluRus, arXiv 2311.01197).

The method is in `AiluRusModel._run_layers`: at `config.cluster_layer` the patch tokens are grouped and merged, the
following layers run on the short sequence with size-weighted attention, and the full grid is unfolded afterwards. What
grouping, merging and unfolding are is in `reduction.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_ailurus import AiluRusConfig
from .heads_segmentation import HEADS, AiluRusMaskTransformerHead, segmentation_loss
from .label_maps import name_foreground
from .layers_ailurus import (
    AiluRusLayer,
    AiluRusLayerScale,
    GroupingOutput,
    LayerShape,
    check_patches,
    check_pixels,
    settings_of_call,
    wanted_states,
    wants_attentions,
)
from .reduction import Reduction, ReductionContext, build_reducer, groups_of, hints_of, merge_places, reduce_sequence
from .settings import AdaptiveResolutionMixin


@dataclass
class AiluRusModelOutput(GroupingOutput, BaseModelOutputWithPooling):
    """Output of `AiluRusModel`.

    Args:
        last_hidden_state: (batch_size, prefix + N, hidden_size), the full grid after the final norm.
        pooler_output: (batch_size, hidden_size), or twice that width for both, class token or mean of the patch tokens,
            see `config.pooling`.
        hidden_states: of every layer, unfolded to the full grid, before the final norm; on request.
        attentions: of every layer, (batch_size, num_heads, T, T); T counts the *merged* tokens in the layers that ran
            on them, prefix tokens first; on request.
        assignment: (batch_size, N) int64, each patch token's cluster.
        group_sizes: (batch_size, M) int64, number of tokens in each cluster.
    """


@dataclass
class AiluRusBackboneOutput(GroupingOutput, BackboneOutput):
    """Feature maps on the full grid; grouping as in `AiluRusModelOutput`."""


@dataclass
class AiluRusSemanticSegmenterOutput(GroupingOutput, SemanticSegmenterOutput):
    """`logits` (batch_size, num_labels, height, width) at the input's size; grouping as in `AiluRusModelOutput`."""


@dataclass
class AiluRusImageClassifierOutput(GroupingOutput, ImageClassifierOutput):
    """`logits` (batch_size, num_labels); grouping as in `AiluRusModelOutput`."""


class AiluRusPatchEmbeddings(nn.Module):
    """Image to patch tokens. The image is padded with zeros at the right and bottom to whole patches."""

    def __init__(self, config: AiluRusConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, size, size, bias=config.patch_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (batch_size, num_channels, height, width) -> tokens (batch_size, N, hidden_size)."""
        check_pixels(pixel_values, self.num_channels)
        check_patches(pixel_values, self.patch_size)
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        patches = self.projection(F.pad(pixel_values, padding).to(self.projection.weight.dtype))
        return patches.flatten(2).transpose(1, 2)


class AiluRusEmbeddings(nn.Module):
    """Patch tokens with learned positions, behind class, distillation and register tokens."""

    def __init__(self, config: AiluRusConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embeddings = AiluRusPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_cls_token else None
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_distillation_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, size)) if registers else None
        rows = config.num_position_rows_before_patches + config.grid_size[0] * config.grid_size[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows, size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (batch_size, num_channels, height, width) -> tokens (batch_size, prefix + N, hidden_size)."""
        patches = self.patch_embeddings(pixel_values)
        patches = patches + self.patch_positions(self.config.patch_grid(*pixel_values.shape[-2:]))
        prefix: list[Tensor | None] = [self.cls_token, self.distillation_token, self.register_tokens]
        if self.config.num_prefix_tokens:
            tokens = torch.cat([token for token in prefix if token is not None], dim=1)
            positions = self.position_embeddings[:, : self.config.num_position_rows_before_patches]
            tokens = tokens + F.pad(positions, (0, 0, 0, tokens.shape[1] - positions.shape[1]))
            patches = torch.cat([tokens.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.dropout(patches)

    def patch_positions(self, grid: tuple[int, int]) -> Tensor:
        """Learned positions (1, rows * columns, hidden_size), resized to `grid` the way the config prescribes."""
        config, trained = self.config, self.config.grid_size
        table = self.position_embeddings[:, config.num_position_rows_before_patches :]
        if config.position_resize_rule == "count":
            fits = grid[0] * grid[1] == trained[0] * trained[1]
        else:
            fits = grid == trained
        if fits:
            return table
        table = table.reshape(1, *trained, -1).permute(0, 3, 1, 2)
        size: dict[str, Any] = {"size": grid}
        if config.position_offset:
            scale = [(side + config.position_offset) / old for side, old in zip(grid, trained, strict=True)]
            size = {"scale_factor": scale}
        # In float32, as the original projects do: half precision interpolation moves the positions visibly.
        resized = F.interpolate(
            table.float(), mode=config.position_interpolation, antialias=config.position_antialias, **size
        )
        return resized.flatten(2).transpose(1, 2).to(self.position_embeddings.dtype)


class AiluRusPreTrainedModel(PreTrainedModel):
    config: AiluRusConfig
    base_model_prefix = "ailurus"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses average over the batch at hand; the Trainer must divide
    _no_split_modules = ["AiluRusEmbeddings", "AiluRusLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Hidden states are unfolded before they are handed out, so the models collect them themselves: no capture hooks.
    _can_record_outputs: dict[str, Any] = {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, AiluRusEmbeddings):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=std)
        elif isinstance(module, AiluRusLayerScale):
            init.constant_(module.lambda1, module.initial_value)
        elif isinstance(module, AiluRusMaskTransformerHead):
            init.trunc_normal_(module.class_tokens, std=std)


class AiluRusModel(AiluRusPreTrainedModel):
    """Plain vision transformer that runs all layers after `config.cluster_layer` on merged tokens."""

    def __init__(self, config: AiluRusConfig):
        super().__init__(config)
        self.embeddings = AiluRusEmbeddings(config)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(AiluRusLayer(config, _encoder_shape(config, index)) for index in range(depth))
        self.reducer = build_reducer(config)
        eps = config.layer_norm_eps
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=eps) if config.use_final_norm else nn.Identity()
        self.pooler_norm = nn.LayerNorm(config.pooled_size, eps=eps) if config.use_pooler_norm else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> AiluRusModelOutput:
        """Run the encoder.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any height and width of at least one patch.
            output_hidden_states: True for all, or the indices of those wanted (the others are None).
            output_attentions: whether to return attention weights; needs `attn_implementation="eager"`.
            kwargs: settings of adaptive resolution for this call, such as `keep_ratio` and `num_clusters`, see
                `AdaptiveResolutionMixin`; and what transformers passes to any model.

        Raises:
            TypeError: a keyword that neither the model nor transformers knows.
        """
        settings = settings_of_call(self, kwargs)
        grid = self.config.patch_grid(*pixel_values.shape[-2:])
        output = self._run_layers(
            self.embeddings(pixel_values), grid, settings, output_hidden_states, output_attentions
        )
        output.last_hidden_state = self.layernorm(output.last_hidden_state)
        output.pooler_output = self.pooler_norm(self._pool(output.last_hidden_state))
        return output

    def _run_layers(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        settings: AdaptiveResolutionMixin,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
    ) -> AiluRusModelOutput:
        wanted = wanted_states(self.config, output_hidden_states, len(self.layers) + 1)
        output_attentions = wants_attentions(self.config, output_attentions)
        all_hidden_states: tuple[Tensor | None, ...] = (hidden_states if 0 in wanted else None,)
        all_attentions: tuple[Tensor | None, ...] = ()
        merged_layers = settings.merged_layers(len(self.layers))
        places = merge_places(settings, merged_layers)
        reduction: Reduction | None = None
        previous = hidden_states
        for index, layer in enumerate(self.layers):
            if index in places:
                reduced = self._reduce(index, hidden_states, previous, grid, settings, reduction)
                if reduced is not None:
                    reduction, hidden_states = reduced, reduced.tokens
            active = reduction if index in merged_layers else None
            previous = hidden_states
            hidden_states, weights = layer(hidden_states, None if active is None else active.log_sizes)
            dense = hidden_states
            if active is not None and (index + 1 in wanted or index == merged_layers[-1]):
                dense = active.restore(hidden_states)
            if index == merged_layers[-1]:
                hidden_states = dense
            all_hidden_states += (dense if index + 1 in wanted else None,)
            all_attentions += (weights,)
        assignment, sizes = groups_of(reduction, hidden_states, self.config.num_prefix_tokens)
        return AiluRusModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states if wanted else None,
            attentions=all_attentions if output_attentions else None,
            assignment=assignment,
            group_sizes=sizes,
        )

    def _reduce(
        self,
        index: int,
        hidden_states: Tensor,
        previous: Tensor,
        grid: tuple[int, int],
        settings: AdaptiveResolutionMixin,
        reduction: Reduction | None,
    ) -> Reduction | None:
        """Reduce before a layer; `previous` are the hidden states before the layer that ran last."""
        layer: Any = self.layers[index]
        num_prefix = self.config.num_prefix_tokens

        def class_attention() -> Tensor:
            return layer.attention.class_attention(layer.layernorm_before(hidden_states))[:, num_prefix:]

        context = ReductionContext(
            norm=layer.layernorm_before,
            keys=lambda: layer.attention.keys(layer.layernorm_before(hidden_states[:, num_prefix:])),
            previous=lambda: previous[:, num_prefix:],
            class_attention=class_attention if self.config.use_cls_token else None,
            reduction=None if reduction is None else reduction.of_patches,
            **hints_of(self.config),
        )
        return reduce_sequence(
            hidden_states,
            grid,
            settings.num_groups(grid[0] * grid[1], index),
            settings,
            context,
            num_prefix=num_prefix,
            method=self.reducer if settings.grouping == self.config.grouping else None,
        )

    def _pool(self, last_hidden_state: Tensor) -> Tensor:
        pooling = self.config.pooling or ("cls" if self.config.use_cls_token else "mean")
        if pooling == "cls":
            return last_hidden_state[:, 0]
        mean = last_hidden_state[:, self.config.num_prefix_tokens :].mean(1)
        return mean if pooling == "mean" else torch.cat([last_hidden_state[:, 0], mean], dim=-1)


def _encoder_shape(config: AiluRusConfig, index: int) -> LayerShape:
    return LayerShape(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.layer_norm_eps,
        dropout=config.hidden_dropout_prob,
        drop_path_rate=config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1),
        qkv_bias=config.qkv_bias,
        layerscale_value=config.layerscale_value,
        use_swiglu_ffn=config.use_swiglu_ffn,
        use_qk_norm=config.use_qk_norm,
    )


class AiluRusBackbone(BackboneMixin, AiluRusModel):
    """`AiluRusModel` as a backbone: feature maps on the full grid at `config.out_features`."""

    def __init__(self, config: AiluRusConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> AiluRusBackboneOutput:
        """Arguments as in `AiluRusModel`. Feature maps are (batch_size, hidden_size, rows, columns) on the patch grid,
        or (batch_size, prefix + N, hidden_size) with `config.reshape_hidden_states=False`; the final norm is applied
        unless `config.apply_layernorm=False`."""
        settings = settings_of_call(self, kwargs)
        requested = wanted_states(self.config, output_hidden_states, len(self.layers) + 1)
        stages = [self.stage_names.index(name) for name in self.out_features]
        grid, wanted = self.config.patch_grid(*pixel_values.shape[-2:]), sorted({*requested, *stages})
        output = self._run_layers(self.embeddings(pixel_values), grid, settings, wanted, output_attentions)
        return AiluRusBackboneOutput(
            feature_maps=tuple(self._feature_map(output.hidden_states[stage], grid) for stage in stages),
            hidden_states=tuple(h if i in requested else None for i, h in enumerate(output.hidden_states))
            if requested
            else None,
            attentions=output.attentions,
            assignment=output.assignment,
            group_sizes=output.group_sizes,
        )

    def _feature_map(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.config.apply_layernorm:
            hidden_states = self.layernorm(hidden_states)
        if not self.config.reshape_hidden_states:
            return hidden_states
        return hidden_states[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid).contiguous()


class AiluRusForSemanticSegmentation(AiluRusPreTrainedModel):
    """AiluRus encoder with Segmenter's or SETR's head, see `config.decode_head`."""

    def __init__(self, config: AiluRusConfig):
        name_foreground(config)
        super().__init__(config)
        self.ailurus = AiluRusModel(config)
        self.decode_head = HEADS[config.decode_head.type](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> AiluRusSemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any height and width of at least one patch.
            labels: (batch_size, height, width) int64, class of each pixel; `config.semantic_loss_ignore_index` marks
                pixels that the loss leaves out.
            kwargs: as in `AiluRusModel`, `output_hidden_states` and `output_attentions` among them.
        """
        output = self.ailurus(pixel_values, **{**kwargs, "return_dict": True})
        height, width = pixel_values.shape[-2:]
        grid = self.config.patch_grid(height, width)
        patches = output.last_hidden_state[:, self.config.num_prefix_tokens :]
        logits = self.decode_head(patches, grid)
        size = (height, width)
        if self.config.logits_resize == "crop":
            # The padding that filled the last patches is upsampled with the rest and cut off, as in Segmenter.
            size = (grid[0] * self.config.patch_size, grid[1] * self.config.patch_size)
        logits = F.interpolate(logits, size=size, mode="bilinear")[..., :height, :width]
        return AiluRusSemanticSegmenterOutput(
            loss=None if labels is None else segmentation_loss(self, logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            assignment=output.assignment,
            group_sizes=output.group_sizes,
        )


class AiluRusForImageClassification(AiluRusPreTrainedModel):
    """AiluRus encoder with a linear classifier on the pooled output, see `config.pooling`.

    With `config.use_distillation_classifier` the logits are the mean of two classifiers', as in distilled DeiT.
    """

    def __init__(self, config: AiluRusConfig):
        super().__init__(config)
        self.ailurus = AiluRusModel(config)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels)
        distilled = config.use_distillation_classifier
        self.distillation_classifier = nn.Linear(config.hidden_size, config.num_labels) if distilled else None
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> AiluRusImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any height and width of at least one patch.
            labels: (batch_size,) int64, class of each image; or float, see `config.problem_type`.
            kwargs: as in `AiluRusModel`, `output_hidden_states` and `output_attentions` among them.
        """
        output = self.ailurus(pixel_values, **{**kwargs, "return_dict": True})
        logits = self.classifier(output.pooler_output)
        if self.distillation_classifier is not None:
            distilled = output.last_hidden_state[:, int(self.config.use_cls_token)]
            logits = (logits + self.distillation_classifier(distilled)) / 2
        return AiluRusImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            assignment=output.assignment,
            group_sizes=output.group_sizes,
        )


__all__ = [
    "AiluRusBackbone",
    "AiluRusForImageClassification",
    "AiluRusForSemanticSegmentation",
    "AiluRusModel",
    "AiluRusPreTrainedModel",
]
