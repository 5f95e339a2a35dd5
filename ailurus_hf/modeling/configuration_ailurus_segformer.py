"""Configuration of the hierarchical AiluRus models (SegFormer)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .class_colours import ClassColoursMixin
from .settings import (
    StageResolutionMixin,
    activation,
    at_least,
    below_one,
    between_zero_and_one,
    finite_from_zero,
    in_unit_interval,
    one_of,
    plain_numbers,
    positive,
    side_or_sides,
    warn_of_misspelt,
)

# Settings with one value per stage, besides `stage_keep_ratios`.
_PER_STAGE = ("depths", "hidden_sizes", "num_attention_heads", "sr_ratios", "patch_sizes", "strides", "mlp_ratios")


@plain_numbers
@strict
class AiluRusSegformerConfig(ClassColoursMixin, StageResolutionMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a SegFormer (arXiv 2105.15203) with adaptive resolution in its stages.

    The settings of the method are those of `StageResolutionMixin`, applied to each stage by itself. The defaults of the
    architecture are those of MiT-B2.

    Args:
        num_channels: channels of the input.
        depths: number of blocks of each stage.
        hidden_sizes: width of each stage's tokens.
        num_attention_heads: heads of each stage; divides its width.
        sr_ratios: side of the square of tokens that is reduced to one key and value, per stage; 1 reduces nothing.
        patch_sizes: kernel of the convolution that starts each stage.
        strides: stride of that convolution.
        mlp_ratios: width of the MLP's hidden layer over the stage's width.
        hidden_act: activation of the MLP.
        hidden_dropout_prob: dropout of residual branches and inside the MLP.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of the LayerNorms in the blocks and at the end of each stage.
        patch_norm_eps: epsilon of the LayerNorm after each stage's first convolution; None means `layer_norm_eps`.
        reduction_norm_eps: epsilon of the LayerNorm after the reduction of keys and values; None means
            `layer_norm_eps`.
        image_size: training size in pixels, one number or (height, width). A remark: no weight depends on it.
        decoder_type: head of the segmentation model. "linear": a linear layer per stage, as in SegFormer by NVlabs and
            transformers; "conv": a linear layer without bias, batch norm and ReLU per stage, as in mmsegmentation's.
        decoder_hidden_size: width of the head.
        batch_norm_eps: epsilon of the head's batch norms.
        classifier_dropout_prob: dropout before the classifier.
        upsample_logits: whether logits come at the input's size, or as the head computes them, at the size of the first
            stage's grid (a quarter of the input's sides).
        semantic_loss_ignore_index: label value that the segmentation loss leaves out.
        binary_threshold: probability above which a pixel is foreground, class 1, in a segmentation model with
            `num_labels=1`; see `label_maps.py`.
        palette: colour (red, green, blue) of every class in pictures, 0 to 255; None for a standard palette.
        window_size: side in pixels of the windows for sliding-window inference; None if the model takes whole images.
        window_stride: distance in pixels between windows; None means `window_size`.
    """

    model_type = "ailurus_segformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions", "assignment", "group_sizes"]

    num_channels: int = validated_field(at_least(1), default=3)
    depths: list[int] | tuple[int, ...] = validated_field(positive, default=(3, 4, 6, 3))
    hidden_sizes: list[int] | tuple[int, ...] = validated_field(positive, default=(64, 128, 320, 512))
    num_attention_heads: list[int] | tuple[int, ...] = validated_field(positive, default=(1, 2, 5, 8))
    sr_ratios: list[int] | tuple[int, ...] = validated_field(positive, default=(8, 4, 2, 1))
    patch_sizes: list[int] | tuple[int, ...] = validated_field(positive, default=(7, 3, 3, 3))
    strides: list[int] | tuple[int, ...] = validated_field(positive, default=(4, 2, 2, 2))
    mlp_ratios: list[float | int] | tuple[float | int, ...] = validated_field(positive, default=(4, 4, 4, 4))
    hidden_act: str = validated_field(activation, default="gelu")
    hidden_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    attention_probs_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    drop_path_rate: float | int = validated_field(below_one, default=0.1)
    initializer_range: float = validated_field(finite_from_zero, default=0.02)
    layer_norm_eps: float = validated_field(finite_from_zero, default=1e-6)
    patch_norm_eps: float | None = validated_field(finite_from_zero, default=None)
    reduction_norm_eps: float | None = validated_field(finite_from_zero, default=None)
    image_size: int | list[int] | tuple[int, int] = validated_field(side_or_sides, default=512)
    decoder_type: str = validated_field(one_of("linear", "conv"), default="linear")
    decoder_hidden_size: int = validated_field(at_least(1), default=768)
    batch_norm_eps: float = validated_field(finite_from_zero, default=1e-5)
    classifier_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.1)
    upsample_logits: bool = True
    semantic_loss_ignore_index: int = 255
    binary_threshold: float = validated_field(between_zero_and_one, default=0.5)
    palette: list[list[int]] | tuple[tuple[int, int, int], ...] | None = None
    window_size: int | None = validated_field(at_least(1), default=None)
    window_stride: int | None = validated_field(at_least(1), default=None)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_of_misspelt(self, kwargs)
        self.stage_names = [f"stage{index}" for index in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def stage_ratios(self) -> tuple[float, ...]:
        """Share of tokens kept in each stage."""
        return self.ratios(len(self.depths))

    def merged_blocks(self, stage: int) -> range:
        """Indices of a stage's blocks that run on merged tokens; empty where the stage keeps all."""
        return self.blocks_of_stage(stage, self.depths)

    @property
    def patch_size(self) -> int:
        """Pixels per token of the first stage, along each side."""
        return self.strides[0]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Grid of the first stage at the training size, (height, width) in tokens."""
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return self.patch_grid(*size)

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid of the first stage, (rows, columns) in tokens, for an image of this size in pixels."""
        return self.stage_grids(height, width)[0]

    def stage_grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Grid of every stage, (rows, columns) in tokens, for an image of this size in pixels."""
        grids = []
        for patch_size, stride in zip(self.patch_sizes, self.strides, strict=True):
            height = (height + 2 * (patch_size // 2) - patch_size) // stride + 1
            width = (width + 2 * (patch_size // 2) - patch_size) // stride + 1
            grids.append((height, width))
        return tuple(grids)

    @property
    def min_image_size(self) -> int:
        """Shortest side in pixels at which every stage has a whole square of tokens to reduce to one key."""
        side = 1
        stages = zip(self.sr_ratios, self.patch_sizes, self.strides, strict=True)
        for reduction, patch_size, stride in reversed(list(stages)):
            side = (max(side, reduction) - 1) * stride + patch_size - 2 * (patch_size // 2)
            side = max(side, 1)
        return side

    def validate_architecture(self) -> None:
        """Part of `@strict` validation. Checks the combination of settings."""
        super().validate_architecture()
        for name in (*_PER_STAGE, "stage_keep_ratios"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.depths):
                raise ValueError(
                    f"{name} must have a value for each of the {len(self.depths)} stages in depths="
                    f"{tuple(self.depths)}, got {tuple(values)}"
                )
        for size, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if size % heads:
                raise ValueError(
                    f"hidden_sizes must be multiples of num_attention_heads={tuple(self.num_attention_heads)}, got "
                    f"{tuple(self.hidden_sizes)}"
                )
        self.check_palette()
        for stage in range(len(self.depths)):
            self.merged_blocks(stage)


__all__ = ["AiluRusSegformerConfig"]
