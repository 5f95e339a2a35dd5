"""Configuration of the AiluRus models."""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .class_colours import ClassColoursMixin
from .settings import (
    AdaptiveResolutionMixin,
    activation,
    at_least,
    below_one,
    between_zero_and_one,
    finite,
    finite_from_zero,
    finite_or_none,
    in_unit_interval,
    odd,
    one_of,
    plain_numbers,
    side_or_sides,
    warn_of_misspelt,
)


@plain_numbers
@strict
class AiluRusDecodeHeadConfig(PreTrainedConfig):
    """Configuration of the head of a segmentation model, `AiluRusConfig.decode_head`.

    Args:
        type: "linear" or "mask_transformer" (Segmenter's), or "progressive_upsampling" (SETR's PUP head, and its naive
            head with one layer and kernel size 1).
        num_layers: layers of the mask transformer, or convolutions of progressive upsampling.
        num_attention_heads: heads of the mask transformer; None means one per 64 channels.
        intermediate_size: width of its MLP; None means four times that of its tokens.
        layer_norm_eps: epsilon of the head's LayerNorms; None means the encoder's.
        dropout_prob: dropout of the mask transformer's residual branches, or of whole channels before the classifier of
            progressive upsampling.
        hidden_size: width of the mask transformer's tokens, or channels of the convolutions of progressive upsampling;
            None means the width of the encoder's tokens.
        kernel_size: side of their kernels, odd.
        upscale: factor by which the map grows after each of them.
    """

    model_type = "ailurus_decode_head"

    type: str = validated_field(one_of("linear", "mask_transformer", "progressive_upsampling"), default="linear")
    num_layers: int = validated_field(at_least(1), default=2)
    num_attention_heads: int | None = validated_field(at_least(1), default=None)
    intermediate_size: int | None = validated_field(at_least(1), default=None)
    layer_norm_eps: float | None = validated_field(finite_from_zero, default=None)
    dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.1)
    hidden_size: int | None = validated_field(at_least(1), default=None)
    kernel_size: int = validated_field(odd, default=3)
    upscale: int = validated_field(at_least(1), default=2)


# Fields of the head by the names they had when they stood among the encoder's; checkpoints from then still have them.
_OLD_NAMES = {
    f"decoder_{name}": name for name in AiluRusDecodeHeadConfig.__annotations__ if name not in ("model_type", "config")
}


@plain_numbers
@strict
class AiluRusConfig(ClassColoursMixin, AdaptiveResolutionMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a plain vision transformer with adaptive resolution.

    The settings of the method are those of `AdaptiveResolutionMixin`. The others describe the transformer, wide
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
        decode_head: the segmentation model's head, an `AiluRusDecodeHeadConfig` or a dictionary of its fields. Its
            fields are also known one by one, as `decoder_type`, `decoder_num_layers` and so on.
        logits_resize: where an image is no whole number of patches: "crop" resizes the logits to the padded image and
            cuts the padding off (Segmenter), "squeeze" resizes them straight to the image (mmsegmentation).
        semantic_loss_ignore_index: label value that the segmentation loss leaves out.
        binary_threshold: probability above which a pixel is foreground, class 1, in a segmentation model with
            `num_labels=1`; see `label_maps.py`.
        palette: colour (red, green, blue) of every class in pictures, 0 to 255; None for a standard palette.
        window_size: side in pixels of the windows for sliding-window inference; None if the model takes whole images.
        window_stride: distance in pixels between windows; None means `window_size`.
    """

    model_type = "ailurus"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions", "assignment", "group_sizes"]
    sub_configs: ClassVar[dict[str, Any]] = {"decode_head": AiluRusDecodeHeadConfig}
    aliases: ClassVar[dict[str, str]] = _OLD_NAMES  # read, set and given like fields

    hidden_size: int = validated_field(at_least(1), default=768)
    num_hidden_layers: int = validated_field(at_least(1), default=12)
    num_attention_heads: int = validated_field(at_least(1), default=12)
    intermediate_size: int = validated_field(at_least(1), default=3072)
    hidden_act: str = validated_field(activation, default="gelu")
    use_swiglu_ffn: bool = False
    hidden_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    attention_probs_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    drop_path_rate: float | int = validated_field(below_one, default=0.0)
    initializer_range: float = validated_field(finite_from_zero, default=0.02)
    layer_norm_eps: float = validated_field(finite_from_zero, default=1e-6)
    image_size: int | list[int] | tuple[int, int] = validated_field(side_or_sides, default=224)
    patch_size: int = validated_field(at_least(1), default=16)
    num_channels: int = validated_field(at_least(1), default=3)
    patch_bias: bool = True
    qkv_bias: bool = True
    use_qk_norm: bool = False
    layerscale_value: float | None = validated_field(finite_or_none, default=None)
    use_cls_token: bool = True
    use_distillation_token: bool = False
    num_register_tokens: int = validated_field(at_least(0), default=0)
    num_prefix_positions: int | None = validated_field(at_least(0), default=None)
    use_final_norm: bool = True
    position_interpolation: str = validated_field(one_of("bicubic", "bilinear"), default="bicubic")
    position_antialias: bool = False
    position_offset: float | int = validated_field(finite, default=0.0)
    position_resize_rule: str = validated_field(one_of("shape", "count"), default="shape")
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    pooling: str | None = validated_field(one_of("cls", "mean", "cls_mean", None), default=None)
    use_pooler_norm: bool = False
    use_distillation_classifier: bool = False
    decode_head: Any = None  # a configuration once constructed, from whatever was given
    logits_resize: str = validated_field(one_of("crop", "squeeze"), default="crop")
    semantic_loss_ignore_index: int = 255
    binary_threshold: float = validated_field(between_zero_and_one, default=0.5)
    palette: list[list[int]] | tuple[tuple[int, int, int], ...] | None = None
    window_size: int | None = validated_field(at_least(1), default=None)
    window_stride: int | None = validated_field(at_least(1), default=None)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        head = {new: kwargs.pop(old) for old, new in self.aliases.items() if old in kwargs}
        if not isinstance(self.decode_head, PreTrainedConfig):
            given = {} if self.decode_head is None else self.decode_head
            if not isinstance(given, Mapping):
                wrong = TypeError(f"must be a configuration or a dictionary of its fields, got {given!r}")
                raise StrictDataclassFieldValidationError("decode_head", wrong)
            try:
                self.decode_head = AiluRusDecodeHeadConfig(**{**given, **head})
            except StrictDataclassError as error:
                raise StrictDataclassFieldValidationError("decode_head", error) from error
        warn_of_misspelt(self, kwargs)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name not in self.aliases:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.decode_head, self.aliases[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.aliases:
            setattr(self.decode_head, self.aliases[name], value)
        else:
            super().__setattr__(name, value)

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
        self.check_palette()
        if self.num_position_rows_before_patches > self.num_prefix_tokens:
            raise ValueError(
                f"num_prefix_positions must be at most the number of prefix tokens {self.num_prefix_tokens}, "
                f"got {self.num_prefix_positions}"
            )
        self.merged_layers(self.num_hidden_layers)


__all__ = ["AiluRusConfig", "AiluRusDecodeHeadConfig"]
