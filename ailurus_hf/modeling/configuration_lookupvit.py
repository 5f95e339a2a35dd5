"""Configuration of the LookupViT models."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict, validated_field
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .class_colours import ClassColoursMixin
from .settings import (
    CompressedSizeMixin,
    activation,
    at_least,
    below_one,
    between_zero_and_one,
    finite_above_zero,
    finite_from_zero,
    in_unit_interval,
    one_of,
    plain_numbers,
    positive,
    side_or_sides,
    warn_of_misspelt,
)

Size = int | list[int] | tuple[int, ...]  # of the compressed tokens, as `CompressedSizeMixin` has it
Grid = tuple[int, ...]


def _sizes(values: Any) -> None:
    if not values:
        raise ValueError(f"must hold at least one compressed size, got {values!r}; such as (3, 5, 7, 10)")
    for value in values:
        positive(value)


@plain_numbers
@strict
class LookupViTConfig(ClassColoursMixin, CompressedSizeMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of LookupViT (arXiv 2407.12753), for images, or for video where `num_frames` is above 1.

    The budget at inference is `compressed_size`, see `CompressedSizeMixin`; the others describe the transformer.

    Args:
        hidden_size: width D of the tokens of both streams.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of attention heads; divides `hidden_size`.
        mlp_ratio: width of the hidden layer of the compressed tokens' MLP, in units of `hidden_size`.
        lookup_mlp_divisor: `hidden_size` over the width of the hidden layer of the lookup tokens' MLP.
        hidden_act: activation of both MLPs.
        hidden_dropout_prob: dropout of embeddings and residual branches.
        attention_probs_dropout_prob: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of every LayerNorm.
        image_size: training size in pixels, one number or (height, width); fixes the grid of the learned positions.
        patch_size: side of a patch in pixels.
        num_channels: channels of the input.
        num_frames: frames of a video in training; 1 makes a model of images. Fixes the learned positions' grid too.
        tubelet_size: consecutive frames that one token covers; divides the frames of every video.
        qkv_bias: whether query, key and value projections have a bias.
        attention_reuse: what the lookup tokens take from the attention that gathers, the other way round: its
            "weights", scaled so that those of a lookup token sum to 1 on average, or its "logits", with a softmax over
            the compressed tokens, so that they sum to 1.
        compressed_sizes: what `compressed_size` is drawn from for each forward in training, with equal chances; those
            larger than the grid are left out. The compressed tokens' learned positions are of the largest of them that
            fits the grid in training, on each axis.
        pooling: what stands for the whole image: the mean of the "compressed" tokens, of the "lookup" tokens, or the
            sum of "both". With "compressed" what the last block gives the lookup tokens gets no gradient, which
            DistributedDataParallel must be told (`find_unused_parameters`).
        apply_layernorm: whether the backbone's feature maps pass the final norm.
        reshape_hidden_states: whether feature maps are (batch_size, hidden_size, height, width), or token sequences,
            for heads such as DPT's: these expect a class token in front, in whose place stands the tokens' mean.
        semantic_loss_ignore_index: label value that the segmentation loss leaves out.
        binary_threshold: probability above which a pixel is foreground, class 1, in a segmentation model with
            `num_labels=1`; see `label_maps.py`.
        palette: colour (red, green, blue) of every class in pictures, 0 to 255; None for a standard palette.
    """

    model_type = "lookupvit"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states", "attentions", "compressed_hidden_state"]

    hidden_size: int = validated_field(at_least(1), default=768)
    num_hidden_layers: int = validated_field(at_least(1), default=12)
    num_attention_heads: int = validated_field(at_least(1), default=12)
    mlp_ratio: float | int = validated_field(finite_above_zero, default=4)
    lookup_mlp_divisor: float | int = validated_field(finite_above_zero, default=2)
    hidden_act: str = validated_field(activation, default="gelu")
    hidden_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    attention_probs_dropout_prob: float | int = validated_field(in_unit_interval(include_zero=True), default=0.0)
    drop_path_rate: float | int = validated_field(below_one, default=0.0)
    initializer_range: float = validated_field(finite_from_zero, default=0.02)
    layer_norm_eps: float = validated_field(finite_from_zero, default=1e-6)
    image_size: int | list[int] | tuple[int, int] = validated_field(side_or_sides, default=224)
    patch_size: int = validated_field(at_least(1), default=16)
    num_channels: int = validated_field(at_least(1), default=3)
    num_frames: int = validated_field(at_least(1), default=1)
    tubelet_size: int = validated_field(at_least(1), default=1)
    qkv_bias: bool = True
    attention_reuse: str = validated_field(one_of("weights", "logits"), default="weights")
    compressed_sizes: list[Size] | tuple[Size, ...] = validated_field(_sizes, default=(3, 5, 7, 10))
    pooling: str = validated_field(one_of("both", "compressed", "lookup"), default="both")
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    semantic_loss_ignore_index: int = 255
    binary_threshold: float = validated_field(between_zero_and_one, default=0.5)
    palette: list[list[int]] | tuple[tuple[int, int, int], ...] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_of_misspelt(self, kwargs)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def intermediate_size(self) -> int:
        """Width of the hidden layer of the compressed tokens' MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def lookup_intermediate_size(self) -> int:
        """Width of the hidden layer of the lookup tokens' MLP."""
        return int(self.hidden_size / self.lookup_mlp_divisor)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Grid of an image or frame in training, (height, width) in patches."""
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return size[0] // self.patch_size, size[1] // self.patch_size

    @property
    def position_grid(self) -> Grid:
        """Grid of the lookup tokens' learned positions: `grid_size`, of video behind the number of tubelets."""
        return (*((self.num_frames // self.tubelet_size,) if self.num_frames > 1 else ()), *self.grid_size)

    @property
    def compressed_position_grid(self) -> Grid:
        """Grid of the compressed tokens' learned positions."""
        fitting = self.fitting_sizes(self.position_grid)
        return tuple(max(sides) for sides in zip(*fitting, strict=True))

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid, (rows, columns) in patches, that covers an image of this size in pixels."""
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def fitting_sizes(self, grid: Grid) -> list[Grid]:
        """Grids of the `compressed_sizes` that are no larger than the grid of the lookup tokens.

        Raises:
            ValueError: all of them are larger, or one has another number of axes.
        """
        sizes = [size_on(grid, size, "compressed_sizes") for size in self.compressed_sizes]
        fitting = [size for size in sizes if fits(size, grid)]
        if not fitting:
            raise ValueError(
                f"compressed_sizes must hold a size that fits the grid of {named(grid)} tokens, got "
                f"{self.compressed_sizes!r}; add a smaller one, or take larger images"
            )
        return fitting

    def validate_architecture(self) -> None:
        """Part of `@strict` validation. Checks the combination of settings."""
        super().validate_architecture()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads={self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        for name, width in (
            ("mlp_ratio", self.intermediate_size),
            ("lookup_mlp_divisor", self.lookup_intermediate_size),
        ):
            if width < 1:
                raise ValueError(
                    f"{name} must leave a hidden layer of width 1 or more, got {getattr(self, name)} "
                    f"with hidden_size={self.hidden_size}"
                )
        if min(self.grid_size) < 1:
            raise ValueError(
                f"image_size must hold at least one patch of patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames must be a multiple of tubelet_size={self.tubelet_size}, got {self.num_frames}"
            )
        self.fitting_sizes(self.position_grid)
        size_on(self.position_grid, self.compressed_size)
        self.check_palette()


def compressed_grid(grid: Grid, compressed_size: Size) -> Grid:
    """Grid of the compressed tokens for a grid of lookup tokens.

    Raises:
        ValueError: it is larger than that of the lookup tokens on some axis, or has another number of axes.
    """
    size = size_on(grid, compressed_size)
    if not fits(size, grid):
        raise ValueError(
            f"compressed_size must be at most the grid of {named(grid)} tokens, got {compressed_size!r}; "
            "lower it, or take larger images"
        )
    return size


def size_on(grid: Grid, size: Size, name: str = "compressed_size") -> Grid:
    """A compressed size as one number for each axis of the grid.

    One number stands for every axis; for the frames of a short video, which are often fewer, for all of them at most.

    Raises:
        ValueError: it has another number of axes.
    """
    if isinstance(size, int):
        return (*(min(size, frames) for frames in grid[:-2]), size, size)
    if len(size) != len(grid):
        axes = "(rows, columns)" if len(grid) == 2 else "(frames, rows, columns)"
        raise ValueError(f"{name} must be one number or {len(grid)} of them, {axes}, got {size!r}")
    return tuple(size)


def fits(size: Grid, grid: Grid) -> bool:
    """Whether a grid is no larger than another on any axis."""
    return all(side <= whole for side, whole in zip(size, grid, strict=True))


def named(grid: Grid) -> str:
    """A grid in words, such as "14 x 14"."""
    return " x ".join(map(str, grid))


__all__ = ["LookupViTConfig"]
