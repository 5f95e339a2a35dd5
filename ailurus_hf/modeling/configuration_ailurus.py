"""Configuration of the AiluRus models."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


def _at_least(minimum: int) -> Any:
    def check(value: int | None) -> None:
        if value is not None and value < minimum:
            raise ValueError(f"must be at least {minimum}, got {value}")

    return check


def _in_unit_interval(include_zero: bool) -> Any:
    def check(value: float) -> None:
        above = value >= 0 if include_zero else value > 0
        if not (above and value <= 1):  # written so that NaN fails too
            raise ValueError(f"must be {'between 0 and 1' if include_zero else 'above 0 and at most 1'}, got {value}")

    return check


def _one_of(*choices: str | None) -> Any:
    def check(value: str | None) -> None:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return check


def _odd(value: int) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"must be odd and above 0, got {value}")


def _finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")


@dataclass(repr=False, eq=False)
class AdaptiveResolutionMixin:
    """The eight settings of adaptive resolution, the same in every model.

    Checked on construction and again on every assignment, so `config.keep_ratio = 0.25` holds from the next forward.

    Args:
        cluster_layer: number of layers that run on all tokens before the tokens are clustered.
        keep_ratio: share of patch tokens kept, above 0 and at most 1; at 1 nothing is merged.
        num_clusters: exact number of tokens kept; wins over `keep_ratio`.
        num_neighbors: k, how many nearest neighbours make a token's density.
        neighborhood_size: lambda, how many grid positions around a token count as its neighbourhood.
        spatial_alpha: weight of the feature distance alone, between 0 and 1; the rest grows with the neighbour's rank.
        unfold: how the grid comes back: "copy" gives each token its cluster's output, "residual" adds what made the
            token differ from its cluster when they were merged.
        tail_layers: number of last layers that run on all tokens again.
    """

    cluster_layer: int = validated_field(_at_least(0), default=2)
    keep_ratio: float | int = validated_field(_in_unit_interval(include_zero=False), default=0.5)
    num_clusters: int | None = validated_field(_at_least(1), default=None)
    num_neighbors: int = validated_field(_at_least(1), default=1)
    neighborhood_size: int = validated_field(_at_least(1), default=50)
    spatial_alpha: float | int = validated_field(_in_unit_interval(include_zero=True), default=0.9)
    unfold: str = validated_field(_one_of("residual", "copy"), default="residual")
    tail_layers: int = validated_field(_at_least(0), default=0)

    def merged_layers(self, num_hidden_layers: int) -> range:
        """Indices of the layers that run on merged tokens.

        Raises:
            ValueError: no layer is left between `cluster_layer` and `tail_layers`.
        """
        last = num_hidden_layers - self.tail_layers - 1
        if self.cluster_layer > last:
            raise ValueError(
                f"cluster_layer must leave a layer to run on merged tokens: with num_hidden_layers="
                f"{num_hidden_layers} and tail_layers={self.tail_layers} it must be at most {last}, "
                f"got {self.cluster_layer}"
            )
        return range(self.cluster_layer, last + 1)


@strict
@dataclass
class AdaptiveResolutionSettings(AdaptiveResolutionMixin):
    """The eight settings by themselves, for models whose configuration is not this package's."""


@strict
class AiluRusConfig(AdaptiveResolutionMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a plain vision transformer with adaptive resolution.

    The eight settings of the method are those of `AdaptiveResolutionMixin`. The others describe the transformer, wide
    enough that any plain ViT with learned absolute positions can be ported into it.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: number of layers.
        num_attention_heads: number of attention heads; divides `hidden_size`.
        intermediate_size: width of the MLP's hidden layer.
        hidden_act: activation of the MLP.
        use_swiglu_ffn: gated MLP (SiLU gate) in place of the plain one.
        hidden_dropout_prob: dropout of embeddings and residual branches.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of every LayerNorm.
        image_size: training size in pixels, one number or (height, width); fixes the grid of the learned positions.
        patch_size: side of a patch in pixels.
        num_channels: channels of the input.
        patch_bias: whether the projection of the patches has a bias.
        qkv_bias: whether query, key and value projections have a bias.
        use_qk_norm: whether queries and keys pass a LayerNorm of their own in each head.
        layerscale_value: initial LayerScale; None leaves LayerScale out.
        use_cls_token: whether a class token precedes the patches.
        use_distillation_token: whether a distillation token follows the class token.
        num_register_tokens: register tokens between those and the patches.
        num_prefix_positions: how many of these prefix tokens have rows in the position table, counted from the first;
            None means class and distillation token.
        use_final_norm: whether a LayerNorm follows the last layer.
        position_interpolation: "bicubic" or "bilinear", how positions are resized to other grids.
        position_antialias: whether that resizing filters when it shrinks.
        position_offset: number added to the target grid's sides to form the scale factor (0.1 in DINO); 0 resizes to
            the exact size.
        position_resize_rule: resize when the "shape" of the grid differs, or only when the token "count" does.
        apply_layernorm: whether the backbone's feature maps pass the final norm.
        reshape_hidden_states: whether feature maps are (batch_size, hidden_size, height, width), or token sequences
            with the prefix tokens in front.
        pooling: what stands for the whole image, the class token ("cls"), the mean of the patch tokens ("mean"), or
            both, one after the other, in a vector of twice the width ("cls_mean"); None means "cls" where there is a
            class token, else "mean".
        use_pooler_norm: whether a LayerNorm follows the pooling (`fc_norm` in timm and MAE).
        use_distillation_classifier: whether the distillation token has a classifier of its own, whose logits are
            averaged with the other's (distilled DeiT).
        decoder_type: head of the segmentation model: "linear" or "mask_transformer" (Segmenter's), or
            "progressive_upsampling" (SETR's PUP head, and its naive head with one layer and kernel size 1).
        decoder_num_layers: layers of the mask transformer, or convolutions of progressive upsampling.
        decoder_num_attention_heads: heads of the mask transformer; None means one per 64 channels.
        decoder_intermediate_size: width of its MLP; None means 4 * `hidden_size`.
        decoder_layer_norm_eps: epsilon of the head's LayerNorms; None means `layer_norm_eps`.
        decoder_dropout_prob: dropout of the mask transformer's residual branches, or of whole channels before the
            classifier of progressive upsampling.
        decoder_hidden_size: channels of the convolutions of progressive upsampling; None means `hidden_size`.
        decoder_kernel_size: side of their kernels, odd.
        decoder_upscale: factor by which the map grows after each of them.
        logits_resize: where an image is no whole number of patches: "crop" resizes the logits to the padded image and
            cuts the padding off (Segmenter), "squeeze" resizes them straight to the image (mmsegmentation).
        semantic_loss_ignore_index: label value that the segmentation loss leaves out.
        palette: colour (red, green, blue) of every class in pictures, 0 to 255; None for a standard palette.
        window_size: side in pixels of the windows for sliding-window inference; None if the model takes whole images.
        window_stride: distance in pixels between windows; None means `window_size`.
    """

    model_type = "ailurus"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions", "assignment", "group_sizes"]

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = validated_field(_at_least(1), default=16)
    num_channels: int = validated_field(_at_least(1), default=3)
    patch_bias: bool = True
    qkv_bias: bool = True
    use_qk_norm: bool = False
    layerscale_value: float | None = None
    use_cls_token: bool = True
    use_distillation_token: bool = False
    num_register_tokens: int = validated_field(_at_least(0), default=0)
    num_prefix_positions: int | None = validated_field(_at_least(0), default=None)
    use_final_norm: bool = True
    position_interpolation: str = validated_field(_one_of("bicubic", "bilinear"), default="bicubic")
    position_antialias: bool = False
    position_offset: float | int = validated_field(_finite, default=0.0)
    position_resize_rule: str = validated_field(_one_of("shape", "count"), default="shape")
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    pooling: str | None = validated_field(_one_of("cls", "mean", "cls_mean", None), default=None)
    use_pooler_norm: bool = False
    use_distillation_classifier: bool = False
    decoder_type: str = validated_field(
        _one_of("linear", "mask_transformer", "progressive_upsampling"), default="linear"
    )
    decoder_num_layers: int = validated_field(_at_least(1), default=2)
    decoder_num_attention_heads: int | None = validated_field(_at_least(1), default=None)
    decoder_intermediate_size: int | None = validated_field(_at_least(1), default=None)
    decoder_layer_norm_eps: float | None = None
    decoder_dropout_prob: float | int = 0.1
    decoder_hidden_size: int | None = validated_field(_at_least(1), default=None)
    decoder_kernel_size: int = validated_field(_odd, default=3)
    decoder_upscale: int = validated_field(_at_least(1), default=2)
    logits_resize: str = validated_field(_one_of("crop", "squeeze"), default="crop")
    semantic_loss_ignore_index: int = 255
    palette: list[list[int]] | tuple[tuple[int, int, int], ...] | None = None
    window_size: int | None = validated_field(_at_least(1), default=None)
    window_stride: int | None = validated_field(_at_least(1), default=None)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Grid of the learned positions, (height, width) in patches."""
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return size[0] // self.patch_size, size[1] // self.patch_size

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid, (rows, columns) in patches, that covers an image of this size in pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which precede the patch tokens and are never merged."""
        return self.use_cls_token + self.use_distillation_token + self.num_register_tokens

    @property
    def pooled_size(self) -> int:
        """Width of the pooled output."""
        return self.hidden_size * (2 if self.pooling == "cls_mean" else 1)

    @property
    def num_position_rows_before_patches(self) -> int:
        """Rows of the position table that belong to prefix tokens."""
        if self.num_prefix_positions is not None:
            return self.num_prefix_positions
        return self.use_cls_token + self.use_distillation_token

    def validate_architecture(self) -> None:
        """Part of `@strict` validation. Checks the combination of settings."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if min(self.grid_size) < 1:
            raise ValueError(
                f"image_size must hold at least one patch of patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.pooling in ("cls", "cls_mean") and not self.use_cls_token:
            raise ValueError(f"pooling must be 'mean' or None when use_cls_token=False, got {self.pooling!r}")
        if self.use_distillation_classifier and not self.use_distillation_token:
            raise ValueError("use_distillation_classifier=True needs use_distillation_token=True")
        if self.palette is not None and len(self.palette) != self.num_labels:
            raise ValueError(
                f"palette must have a colour for each of the num_labels={self.num_labels} classes, "
                f"got {len(self.palette)}"
            )
        if self.num_position_rows_before_patches > self.num_prefix_tokens:
            raise ValueError(
                f"num_prefix_positions must be at most the number of prefix tokens {self.num_prefix_tokens}, "
                f"got {self.num_prefix_positions}"
            )
        self.merged_layers(self.num_hidden_layers)


__all__ = ["AdaptiveResolutionMixin", "AdaptiveResolutionSettings", "AiluRusConfig"]
