"""SegFormer with adaptive resolution (AiluRus, arXiv 2311.01197, in the stages of arXiv 2105.15203).

The method is in `AiluRusSegformerStage.forward`: after `config.cluster_layer` blocks of a stage its tokens are
clustered and merged, the remaining blocks run on the short sequence, and the grid is unfolded for the next stage and
the head. Two operations of a block need the grid; `AiluRusSegformerAttention` and `AiluRusSegformerMLP` say how they
get it.

Parameters have the names of transformers' own SegFormer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_ailurus_segformer import AiluRusSegformerConfig
from .heads_segmentation import AiluRusSegformerDecodeHead, segmentation_loss
from .label_maps import name_foreground
from .layers_ailurus import (
    AiluRusDropPath,
    GroupingOutput,
    check_pixels,
    eager_attention_forward,
    map_to_tokens,
    settings_of_call,
    tokens_to_map,
    wanted_states,
    wants_attentions,
)
from .reduction import Reduction, ReductionContext, build_reducer, groups_of, hints_of, merge_places, reduce
from .settings import StageResolutionMixin, resolve_num_groups
from .size_weighted_attention import size_weighted_attention

Grid = tuple[int, int]
OnTokens = Callable[[Tensor], Tensor]


@dataclass
class AiluRusSegformerModelOutput(GroupingOutput, BaseModelOutput):
    """Output of `AiluRusSegformerModel`.

    Args:
        last_hidden_state: (batch_size, channels, rows, columns), the last stage's feature map after its norm.
        hidden_states: such a feature map of every stage, each on its full grid; on request.
        attentions: of every block of every stage in turn, (batch_size, num_heads, queries, keys); queries are *merged*
            tokens in the blocks that ran on them, keys the reduced grid; on request.
        assignment: for every stage (batch_size, N) int64, each token's cluster.
        group_sizes: for every stage (batch_size, M) int64, number of tokens in each cluster.
    """


@dataclass
class AiluRusSegformerBackboneOutput(GroupingOutput, BackboneOutput):
    """Feature maps on the full grids; grouping as in `AiluRusSegformerModelOutput`."""


@dataclass
class AiluRusSegformerSegmenterOutput(GroupingOutput, SemanticSegmenterOutput):
    """`logits` (batch_size, num_labels, height, width) at the input's size, or a quarter of it with
    `config.upsample_logits=False`; grouping as in `AiluRusSegformerModelOutput`."""


class AiluRusSegformerPatchEmbeddings(nn.Module):
    """Overlapping patches: a strided convolution, then a LayerNorm."""

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        channels = config.num_channels if stage == 0 else config.hidden_sizes[stage - 1]
        size, stride = config.patch_sizes[stage], config.strides[stage]
        self.proj = nn.Conv2d(channels, config.hidden_sizes[stage], size, stride, padding=size // 2)
        eps = config.layer_norm_eps if config.patch_norm_eps is None else config.patch_norm_eps
        self.layer_norm = nn.LayerNorm(config.hidden_sizes[stage], eps=eps)

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Grid]:
        """Map (batch_size, channels, height, width) -> tokens (batch_size, N, hidden_size), their grid."""
        patches = self.proj(feature_map.to(self.proj.weight.dtype))
        return self.layer_norm(map_to_tokens(patches)), (patches.shape[2], patches.shape[3])


class AiluRusSegformerReduction(nn.Module):
    """Makes one token of each square of tokens, to serve as key and value: a convolution, then a LayerNorm."""

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        size, ratio = config.hidden_sizes[stage], config.sr_ratios[stage]
        self.sequence_reduction = nn.Conv2d(size, size, ratio, ratio)
        eps = config.layer_norm_eps if config.reduction_norm_eps is None else config.reduction_norm_eps
        self.layer_norm = nn.LayerNorm(size, eps=eps)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens of the whole grid (batch_size, N, hidden_size) -> (batch_size, about N / ratio^2, hidden_size)."""
        return self.layer_norm(map_to_tokens(self.sequence_reduction(tokens_to_map(tokens, grid))))


class AiluRusSegformerAttention(nn.Module):
    """Multi-head attention of (merged) tokens to reduced keys and values.

    Where keys and values are reduced, they come from the unfolded grid: each token of the grid counts once there, so
    the softmax needs no sizes. Where they are not (`sr_ratios` 1, the last stage), they are the merged tokens
    themselves with the logarithm of their sizes added to the scores: exactly what attention to the unfolded copies
    would give, at a fraction of its cost.
    """

    is_causal = False

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        self.config = config
        size = config.hidden_sizes[stage]
        self.head_dim = size // config.num_attention_heads[stage]
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.sequence_reduction = AiluRusSegformerReduction(config, stage) if config.sr_ratios[stage] > 1 else None

    def forward(
        self, queries: Tensor, context: Tensor, grid: Grid, log_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            queries: (batch_size, T, hidden_size), normed tokens, merged or not.
            context: what keys and values are made from: the normed tokens of the whole grid (batch_size, N,
                hidden_size) with a reduction, else the same as `queries`.
            grid: (rows, columns) of the N tokens.
            log_sizes: (batch_size, T), for a context of merged tokens.
        """
        if self.sequence_reduction is not None:
            context = self.sequence_reduction(context, grid)

        def split_heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        implementation = self.config._attn_implementation
        output, weights = size_weighted_attention(
            ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward),
            implementation,
            self,
            split_heads(self.q_proj(queries)),
            split_heads(self.k_proj(context)),
            split_heads(self.v_proj(context)),
            log_sizes,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(output.flatten(2)), weights


class AiluRusSegformerDepthwiseConv(nn.Module):
    """The 3 x 3 depthwise convolution inside the MLP, by which SegFormer knows positions."""

    def __init__(self, size: int):
        super().__init__()
        self.dwconv = nn.Conv2d(size, size, 3, padding=1, groups=size)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens of the whole grid (batch_size, N, size) -> same."""
        return map_to_tokens(self.dwconv(tokens_to_map(tokens, grid)))


class AiluRusSegformerMLP(nn.Module):
    """Linear, depthwise convolution, activation, linear.

    On merged tokens the convolution sees each hidden token copied to its cluster's positions; the mean of its results
    over the cluster goes on. Linear layers and activation run on merged tokens only.
    """

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        size = config.hidden_sizes[stage]
        hidden_size = int(size * config.mlp_ratios[stage])
        self.fc1 = nn.Linear(size, hidden_size)
        self.dwconv = AiluRusSegformerDepthwiseConv(hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_size, size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, tokens: Tensor, grid: Grid, merge: OnTokens | None = None, spread: OnTokens | None = None
    ) -> Tensor:
        """(batch_size, T, hidden_size) -> same; merged tokens where `merge` and `spread` are given, see `Reduction`."""
        hidden = self.fc1(tokens)
        if merge is None or spread is None:
            hidden = self.dwconv(hidden, grid)
        else:
            hidden = merge(self.dwconv(spread(hidden), grid))
        return self.dropout(self.fc2(self.dropout(self.activation_fn(hidden))))


class AiluRusSegformerBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then MLP."""

    def __init__(self, config: AiluRusSegformerConfig, stage: int, drop_path_rate: float):
        super().__init__()
        size = config.hidden_sizes[stage]
        self.layernorm_before = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = AiluRusSegformerAttention(config, stage)
        self.layernorm_after = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = AiluRusSegformerMLP(config, stage)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = AiluRusDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        grid: Grid,
        merge: OnTokens | None = None,
        spread: OnTokens | None = None,
        log_sizes: Tensor | None = None,
        residual: Tensor | None = None,  # by itself: reentrant checkpointing would miss it inside a record
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (batch_size, T, hidden_size) -> tokens, attention weights. Merged if `spread` is given; the arguments
        from there on are those of a `Reduction`."""
        queries = context = self.layernorm_before(hidden_states)
        if spread is not None and self.attention.sequence_reduction is not None:
            log_sizes = None
            # The norm of copies is copies of the norm.
            copied = spread(queries) if residual is None else spread(hidden_states) + residual
            context = copied if residual is None else self.layernorm_before(copied)
        attended, weights = self.attention(queries, context, grid, log_sizes)
        hidden_states = hidden_states + self.drop_path(self.hidden_dropout(attended))
        transformed = self.mlp(self.layernorm_after(hidden_states), grid, merge, spread)
        return hidden_states + self.drop_path(transformed), weights


class StageOutput(NamedTuple):
    """What a stage hands on: its feature map, the attention weights of its blocks, and its clusters."""

    feature_map: Tensor
    attentions: tuple[Tensor | None, ...]
    assignment: Tensor | None
    group_sizes: Tensor | None


class AiluRusSegformerStage(nn.Module):
    """Patch embeddings, blocks, of which some run on merged tokens, and a norm."""

    def __init__(self, config: AiluRusSegformerConfig, stage: int):
        super().__init__()
        self.config = config
        self.stage = stage
        self.patch_embeddings = AiluRusSegformerPatchEmbeddings(config, stage)
        first, total = sum(config.depths[:stage]), sum(config.depths)
        self.blocks = nn.ModuleList(
            AiluRusSegformerBlock(config, stage, config.drop_path_rate * (first + index) / max(total - 1, 1))
            for index in range(config.depths[stage])
        )
        self.layer_norm = nn.LayerNorm(config.hidden_sizes[stage], eps=config.layer_norm_eps)
        self.reducer = build_reducer(config)

    def forward(self, feature_map: Tensor, settings: StageResolutionMixin) -> StageOutput:
        """Map (batch_size, channels, height, width) of the image or the stage before -> this stage's output."""
        tokens, grid = self.patch_embeddings(feature_map)
        attentions: tuple[Tensor | None, ...] = ()
        depths = [*self.config.depths[: self.stage], len(self.blocks), *self.config.depths[self.stage + 1 :]]
        merged_blocks = settings.blocks_of_stage(self.stage, depths)  # of the blocks there are: some may have been cut
        places = merge_places(settings, merged_blocks) if merged_blocks else ()
        reduction: Reduction | None = None
        previous = tokens
        for index, block in enumerate(self.blocks):
            if index in places:
                reduced = self._reduce(index, tokens, previous, grid, settings, reduction)
                if reduced is not None:
                    reduction, tokens = reduced, reduced.tokens
            previous = tokens
            if reduction is not None and index in merged_blocks:
                tokens, weights = block(
                    tokens, grid, reduction.merge, reduction.spread, reduction.log_sizes, reduction.residual
                )
                tokens = reduction.restore(tokens) if index == merged_blocks[-1] else tokens
            else:
                tokens, weights = block(tokens, grid)
            attentions += (weights,)
        feature_map = tokens_to_map(self.layer_norm(tokens), grid).contiguous()
        return StageOutput(feature_map, attentions, *groups_of(reduction, tokens))

    def _reduce(
        self,
        index: int,
        tokens: Tensor,
        previous: Tensor,
        grid: Grid,
        settings: StageResolutionMixin,
        reduction: Reduction | None,
    ) -> Reduction | None:
        """Reduce before a block; `previous` are the tokens before the block that ran last."""
        block: Any = self.blocks[index]
        ratio = settings.ratios(len(self.config.depths))[self.stage]
        context = ReductionContext(
            norm=block.layernorm_before,
            keys=lambda: block.attention.k_proj(block.layernorm_before(tokens)),
            previous=lambda: previous,
            reduction=reduction,
            **hints_of(self.config),
        )
        method = self.reducer if settings.grouping == self.config.grouping else None
        num_groups = resolve_num_groups(grid[0] * grid[1], ratio, settings.num_clusters)
        reduced = reduce(tokens, grid, num_groups, settings, context, method)
        if reduced is not None and (reduced.merge is None or reduced.spread is None):
            raise ValueError(
                f"grouping {settings.grouping!r} has no merge and spread, which SegFormer's blocks need to look at the "
                "grid in between; choose another grouping"
            )
        return reduced


class AiluRusSegformerPreTrainedModel(PreTrainedModel):
    config: AiluRusSegformerConfig
    base_model_prefix = "segformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss averages over the batch at hand; the Trainer must divide
    _no_split_modules = ["AiluRusSegformerStage"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The models collect feature maps and attention weights themselves: no capture hooks.
    _can_record_outputs: dict[str, Any] = {}


class AiluRusSegformerModel(AiluRusSegformerPreTrainedModel):
    """SegFormer's hierarchical encoder, with the last blocks of its stages on merged tokens."""

    def __init__(self, config: AiluRusSegformerConfig):
        super().__init__(config)
        self.stages = nn.ModuleList(AiluRusSegformerStage(config, stage) for stage in range(len(config.depths)))
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.stages[0].patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> AiluRusSegformerModelOutput:
        """Run the encoder.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any sides of at least `config.min_image_size`.
            output_hidden_states: True for the feature maps of all stages, or the indices of those wanted (the others
                are None).
            output_attentions: whether to return attention weights; needs `attn_implementation="eager"`.
            kwargs: settings of adaptive resolution for this call, such as `keep_ratio` and `stage_keep_ratios`, see
                `StageResolutionMixin`; and what transformers passes to any model.

        Raises:
            TypeError: a keyword that neither the model nor transformers knows.
        """
        settings = settings_of_call(self, kwargs)
        stages = self._run_stages(pixel_values, settings, output_attentions)
        return AiluRusSegformerModelOutput(
            last_hidden_state=stages[-1].feature_map, **_shared_outputs(self.config, stages, output_hidden_states)
        )

    def _run_stages(
        self, pixel_values: Tensor, settings: StageResolutionMixin, output_attentions: bool | None
    ) -> list[StageOutput]:
        """What every stage computes from pixels (batch_size, num_channels, height, width)."""
        self._check(pixel_values)
        output_attentions = wants_attentions(self.config, output_attentions)
        outputs: list[StageOutput] = []
        feature_map = pixel_values
        for stage in self.stages:
            output = stage(feature_map, settings)
            outputs.append(output if output_attentions else output._replace(attentions=()))
            feature_map = output.feature_map
        return outputs

    def _check(self, pixel_values: Tensor) -> None:
        check_pixels(pixel_values, self.config.num_channels)
        if min(pixel_values.shape[-2:]) < (least := self.config.min_image_size):
            raise ValueError(
                f"pixel_values must be at least {least} x {least} pixels, so that every stage has a whole square of "
                f"tokens to reduce (sr_ratios={tuple(self.config.sr_ratios)}), got height and width "
                f"{tuple(pixel_values.shape[-2:])}; enlarge the image or pad it"
            )


def _shared_outputs(
    config: AiluRusSegformerConfig, stages: list[StageOutput], requested: bool | int | list[int] | None
) -> dict[str, Any]:
    """The outputs that all models have."""
    return {
        "hidden_states": _requested_maps(config, [stage.feature_map for stage in stages], requested),
        "attentions": sum((stage.attentions for stage in stages), start=()) or None,
        "assignment": tuple(stage.assignment for stage in stages),
        "group_sizes": tuple(stage.group_sizes for stage in stages),
    }


def _requested_maps(
    config: AiluRusSegformerConfig, feature_maps: Sequence[Tensor], requested: bool | int | list[int] | None
) -> tuple[Tensor | None, ...] | None:
    """The feature maps that a flag, an index or a list of indices asks for, None in the place of the others."""
    wanted = wanted_states(config, requested, len(feature_maps))
    chosen = tuple(feature_map if index in wanted else None for index, feature_map in enumerate(feature_maps))
    return chosen if wanted else None


class AiluRusSegformerBackbone(BackboneMixin, AiluRusSegformerModel):
    """`AiluRusSegformerModel` as a backbone: the feature maps of the stages in `config.out_features`."""

    def __init__(self, config: AiluRusSegformerConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> AiluRusSegformerBackboneOutput:
        """Arguments as in `AiluRusSegformerModel`. Feature maps are (batch_size, channels, rows, columns), after the
        stage's norm."""
        settings = settings_of_call(self, kwargs)
        stages = self._run_stages(pixel_values, settings, output_attentions)
        feature_maps = tuple(stages[self.stage_names.index(name)].feature_map for name in self.out_features)
        return AiluRusSegformerBackboneOutput(
            feature_maps=feature_maps, **_shared_outputs(self.config, stages, output_hidden_states)
        )


class AiluRusSegformerForSemanticSegmentation(AiluRusSegformerPreTrainedModel):
    """Hierarchical AiluRus encoder with SegFormer's all-MLP head."""

    def __init__(self, config: AiluRusSegformerConfig):
        name_foreground(config)
        super().__init__(config)
        self.segformer = AiluRusSegformerModel(config)
        self.decode_head = AiluRusSegformerDecodeHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> AiluRusSegformerSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any sides of at least `config.min_image_size`.
            labels: (batch_size, height, width) int64, class of each pixel; `config.semantic_loss_ignore_index` is left
                out of the loss.
            kwargs: as in `AiluRusSegformerModel`, `output_hidden_states` and `output_attentions` among them.
        """
        size, requested = pixel_values.shape[-2:], kwargs.get("output_hidden_states")
        output = self.segformer(pixel_values, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        logits = self.decode_head(list(output.hidden_states))
        if labels is not None or self.config.upsample_logits:
            upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return AiluRusSegformerSegmenterOutput(
            loss=None if labels is None else segmentation_loss(self, upsampled, labels),
            logits=upsampled if self.config.upsample_logits else logits,
            hidden_states=_requested_maps(self.config, output.hidden_states, requested),
            attentions=output.attentions,
            assignment=output.assignment,
            group_sizes=output.group_sizes,
        )


__all__ = [
    "AiluRusSegformerBackbone",
    "AiluRusSegformerForSemanticSegmentation",
    "AiluRusSegformerModel",
    "AiluRusSegformerPreTrainedModel",
]
