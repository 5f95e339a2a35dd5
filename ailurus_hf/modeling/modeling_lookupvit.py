"""LookupViT (arXiv 2407.12753): two streams of tokens, of which the small one does the heavy work.

The lookup tokens are the patches of the whole grid; the compressed tokens are a grid of any smaller size, resized from
them. In each block the compressed tokens gather from the lookup tokens and are refined by attention among themselves
and an MLP; the lookup tokens take the result back by the same attention and have a light MLP. One model serves
every compressed size: in training it is drawn for each forward.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

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

from .configuration_lookupvit import Grid, LookupViTConfig, compressed_grid
from .heads_segmentation import AiluRusLinearHead, segmentation_loss
from .label_maps import name_foreground
from .layers_ailurus import check_patches, check_pixels, settings_of_call, wanted_states
from .layers_lookupvit import LookupViTBlock

logger = logging.getLogger(__name__)


@dataclass
class LookupViTModelOutput(BaseModelOutputWithPooling):
    """Output of `LookupViTModel`.

    Args:
        last_hidden_state: (batch_size, N, hidden_size), the lookup tokens on the full grid after the final norm.
        pooler_output: (batch_size, hidden_size), see `config.pooling`.
        hidden_states: lookup tokens before the first and after every block, before the final norm; on request.
        attentions: of every block, (batch_size, num_heads, M, N), the weights with which the compressed tokens gather
            from the lookup tokens; on request, with any attention implementation.
        compressed_hidden_state: (batch_size, M, hidden_size), the compressed tokens after their final norm.
    """

    compressed_hidden_state: Tensor | None = None


class LookupViTPatchEmbeddings(nn.Module):
    """Image or video to a grid of tokens. Images are padded with zeros at the right and bottom to whole patches."""

    def __init__(self, config: LookupViTConfig):
        super().__init__()
        self.config = config
        size, convolution = (config.patch_size, config.patch_size), nn.Conv2d
        if config.num_frames > 1:
            size, convolution = (config.tubelet_size, *size), nn.Conv3d  # type: ignore[assignment]
        self.projection = convolution(config.num_channels, config.hidden_size, size, size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels (batch_size, num_channels, height, width), or of a model of video (batch_size, num_frames,
        num_channels, height, width), -> (batch_size, hidden_size, *grid)."""
        patch_size = self.config.patch_size
        if self.config.num_frames > 1:
            self._check_video(pixel_values)
            pixel_values = pixel_values.transpose(1, 2)
        else:
            check_pixels(pixel_values, self.config.num_channels)
        check_patches(pixel_values, patch_size)
        height, width = pixel_values.shape[-2:]
        pixel_values = F.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
        return self.projection(pixel_values.to(self.projection.weight.dtype))

    def _check_video(self, pixel_values: Tensor) -> None:
        shape, channels, tubelet = tuple(pixel_values.shape), self.config.num_channels, self.config.tubelet_size
        if pixel_values.ndim != 5 or shape[2] != channels:
            raise ValueError(
                f"pixel_values must be (batch_size, num_frames, num_channels={channels}, height, width), as the model "
                f"is one of video, got shape {shape}"
            )
        if shape[1] < 1 or shape[1] % tubelet:
            raise ValueError(
                f"pixel_values must have a number of frames that tubelet_size={tubelet} divides, got {shape[1]}; "
                f"leave out {shape[1] % tubelet} or repeat the last {-shape[1] % tubelet} times"
            )


class LookupViTEmbeddings(nn.Module):
    """Both streams at the start: the patches with learned positions, and those resized, with positions of their own."""

    def __init__(self, config: LookupViTConfig):
        super().__init__()
        self.grid, self.compressed_grid = config.position_grid, config.compressed_position_grid
        self.patch_embeddings = LookupViTPatchEmbeddings(config)
        tables = (torch.zeros(1, _count(grid), config.hidden_size) for grid in (self.grid, self.compressed_grid))
        self.position_embeddings, self.compressed_position_embeddings = map(nn.Parameter, tables)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, patches: Tensor, compressed_size: Grid) -> tuple[Tensor, Tensor]:
        """Embedded patches (batch_size, hidden_size, *grid) -> compressed tokens (batch_size, M, hidden_size) and
        lookup tokens (batch_size, N, hidden_size)."""
        lookup = patches + _resized_positions(self.position_embeddings, self.grid, patches.shape[2:])
        positions = _resized_positions(self.compressed_position_embeddings, self.compressed_grid, compressed_size)
        compressed = resize(lookup, compressed_size) + positions
        return tuple(self.dropout(tokens.flatten(2).transpose(1, 2)) for tokens in (compressed, lookup))


def resize(maps: Tensor, grid: Grid) -> Tensor:
    """Maps (batch_size, channels, *axes) on another grid, linearly on each axis; of the right size they stay."""
    if maps.shape[2:] == torch.Size(grid):
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear" if len(grid) == 2 else "trilinear")


def _resized_positions(table: Tensor, trained: Grid, grid: Grid) -> Tensor:
    """Learned positions (1, T, hidden_size) -> (1, hidden_size, *grid), resized in float32."""
    maps = table.transpose(1, 2).unflatten(2, trained)
    return resize(maps.float(), grid).to(table.dtype)


def _count(grid: Grid) -> int:
    return int(torch.Size(grid).numel())


class LookupViTPreTrainedModel(PreTrainedModel):
    config: LookupViTConfig
    base_model_prefix = "lookupvit"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses average over the batch at hand; the Trainer must divide
    _no_split_modules = ["LookupViTEmbeddings", "LookupViTBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: dict[str, Any] = {}  # the models collect them themselves

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LookupViTEmbeddings):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def from_vit(cls, vit: Any, **overrides: Any) -> Self:
        """A new model with the weights of a plain vision transformer, as a start for training or distillation.

        It is no more than a start: before training the features correlate with the ViT's, but are far from equal.

        Copied where the shapes agree: patch embedding (for video spread over the frames of a tubelet, so that a still
        video is embedded as its picture), positions (resized to another grid), each layer's attention and MLP to
        the block's refinement, its attention once more to gathering and its values and output to infusing, its norms
        to those of the same place, the final norm to both streams. The lookup tokens' MLP takes those hidden units of
        the layer's MLP whose weights, in times out, have the largest norms. LayerScale is multiplied into the layers.
        The compressed tokens' positions are zero: they are resized from tokens that have positions already. Class
        tokens and heads are left out. What is left random is logged.

        Args:
            vit: a `ViTModel`, `ViTForImageClassification`, plain AiluRus model, or whatever else has the layers and
                names of ViT; or the folder or Hub name of such a checkpoint.
            overrides: fields of the configuration that are not as in the ViT's, such as `compressed_sizes`,
                `num_frames`.

        Raises:
            TypeError: the model has not the layers of a plain vision transformer.
        """
        if isinstance(vit, str | os.PathLike):
            from transformers import AutoModel  # which registers these very models

            vit = AutoModel.from_pretrained(vit)
        encoder = getattr(vit, getattr(vit, "base_model_prefix", ""), vit)
        source = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
        if "layers.0.mlp.fc1.weight" not in source or "layers.0.attention.q_norm.weight" in source:
            raise TypeError(
                "vit must be a plain vision transformer with the layers of transformers' ViT (no gated MLP, no norms "
                f"of queries and keys), got {type(vit).__name__}"
            )
        model = cls(LookupViTConfig(**{**_shape_of_vit(vit.config), **overrides}))
        target: Any = getattr(model, model.base_model_prefix, model)
        wanted = target.state_dict()
        start = _start_from_vit(source, vit.config, model.config)
        copied = {name: start[name] for name in wanted if name in start and start[name].shape == wanted[name].shape}
        target.load_state_dict(copied, strict=False)
        if random := sorted(wanted.keys() - copied.keys()):
            logger.warning("not in the ViT, or of another shape, and so left random: %s", ", ".join(random))
        if target is not model:
            logger.warning("the head of %s is new and random", cls.__name__)
        return model


_VIT_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "id2label",
    "label2id",
)


def _shape_of_vit(config: Any) -> dict[str, Any]:
    """The fields of a ViT's configuration that ours has too, under our names."""
    fields = {name: getattr(config, name) for name in _VIT_FIELDS}
    return {**fields, "mlp_ratio": config.intermediate_size / config.hidden_size}


def _start_from_vit(source: Mapping[str, Tensor], vit: Any, config: LookupViTConfig) -> dict[str, Tensor]:
    """The tensors of a plain ViT under the names that they have in `LookupViTModel`."""
    patches = source["embeddings.patch_embeddings.projection.weight"]
    size = (vit.image_size,) * 2 if isinstance(vit.image_size, int) else vit.image_size
    grid = tuple(side // vit.patch_size for side in size)
    positions = _resized_positions(source["embeddings.position_embeddings"][:, -_count(grid) :], grid, config.grid_size)
    if config.num_frames > 1:
        patches = patches[:, :, None].expand(-1, -1, config.tubelet_size, -1, -1) / config.tubelet_size
        positions = positions[:, :, None].expand(-1, -1, config.num_frames // config.tubelet_size, -1, -1)
    count = _count(config.compressed_position_grid)
    start = {
        "embeddings.patch_embeddings.projection.weight": patches,
        "embeddings.position_embeddings": positions.flatten(2).transpose(1, 2),
        "embeddings.compressed_position_embeddings": positions.new_zeros(1, count, vit.hidden_size),
    }
    bias = "embeddings.patch_embeddings.projection.bias"
    start[bias] = source.get(bias, patches.new_zeros(vit.hidden_size))
    for index in range(vit.num_hidden_layers):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
        block = _block_from_layer(layer, config.lookup_intermediate_size)
        start |= {prefix + name: tensor for name, tensor in block.items()}
    norm = {name: tensor for name, tensor in source.items() if name.startswith("layernorm.")}
    return {**start, **norm, **{f"compressed_{name}": tensor for name, tensor in norm.items()}}


def _block_from_layer(layer: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """A block's tensors from those of a layer; `width` is that of the light MLP's hidden layer."""
    layer = dict(layer)
    for scale, output in (("layer_scale1", "attention.o_proj"), ("layer_scale2", "mlp.fc2")):
        if (factor := layer.pop(f"{scale}.lambda1", None)) is not None:
            layer[f"{output}.weight"] = factor[:, None] * layer[f"{output}.weight"]
            layer[f"{output}.bias"] = factor * layer[f"{output}.bias"]
    block = dict(layer)
    for name, tensor in layer.items():
        part, _, rest = name.partition(".")
        if part == "attention":
            block[f"gather.{rest}"] = tensor
            block[f"infuse.{rest}"] = tensor
        elif part == "layernorm_before":
            block |= dict.fromkeys((f"gather.compressed_norm.{rest}", f"gather.lookup_norm.{rest}"), tensor)
            block[f"infuse.norm.{rest}"] = tensor
        elif part == "layernorm_after":
            block[f"lookup_norm.{rest}"] = tensor
    inward, outward = layer["mlp.fc1.weight"], layer["mlp.fc2.weight"]
    strength = inward.norm(dim=1) * outward.norm(dim=0)
    units = strength.topk(min(width, len(strength))).indices.sort().values
    block |= {
        "lookup_mlp.fc1.weight": inward[units],
        "lookup_mlp.fc1.bias": layer["mlp.fc1.bias"][units],
        "lookup_mlp.fc2.weight": outward[:, units],
        "lookup_mlp.fc2.bias": layer["mlp.fc2.bias"],
    }
    return block


class LookupViTModel(LookupViTPreTrainedModel):
    """LookupViT without a head, for images or video.

    Args:
        config: the configuration.
        add_compressed_norm: whether the compressed tokens have a final norm; heads that read none of them leave it out,
            so that every parameter gets a gradient.
    """

    def __init__(self, config: LookupViTConfig, add_compressed_norm: bool = True):
        super().__init__(config)
        self.embeddings = LookupViTEmbeddings(config)
        depth, size, eps = config.num_hidden_layers, config.hidden_size, config.layer_norm_eps
        self.layers = nn.ModuleList(
            LookupViTBlock(config, config.drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )
        self.layernorm = nn.LayerNorm(size, eps=eps)
        self.compressed_layernorm = nn.LayerNorm(size, eps=eps) if add_compressed_norm else nn.Identity()
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
    ) -> LookupViTModelOutput:
        """Run the encoder.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any height and width of at least one patch; of a
                model of video (batch_size, num_frames, num_channels, height, width), with any number of frames that
                `config.tubelet_size` divides.
            output_hidden_states: True for all, or the indices of those wanted (the others are None).
            output_attentions: whether to return the weights of gathering.
            kwargs: `compressed_size` for this call; and what transformers passes to any model. While training, where
                neither the call nor `with_budget` gives it, it is drawn from `config.compressed_sizes` with torch's
                generator, on each process by itself; where the model is compiled it is `config.compressed_size`.

        Raises:
            TypeError: a keyword that neither the model nor transformers knows.
            ValueError: the compressed size is larger than the grid, or has another number of axes.
        """
        output, _ = self._run_blocks(pixel_values, kwargs, output_hidden_states, output_attentions)
        lookup = output.last_hidden_state = self.layernorm(output.last_hidden_state)
        compressed = output.compressed_hidden_state = self.compressed_layernorm(output.compressed_hidden_state)
        streams = {"compressed": [compressed], "lookup": [lookup], "both": [compressed, lookup]}[self.config.pooling]
        output.pooler_output = torch.stack([tokens.mean(1) for tokens in streams]).sum(0)
        return output

    def _run_blocks(
        self,
        pixel_values: Tensor,
        keywords: Mapping[str, Any],
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
    ) -> tuple[LookupViTModelOutput, Grid]:
        """Both streams before their final norms, and the grid of the lookup tokens."""
        settings = settings_of_call(self, keywords)
        wanted = wanted_states(self.config, output_hidden_states, len(self.layers) + 1)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        patches = self.embeddings.patch_embeddings(pixel_values)
        grid = tuple(patches.shape[2:])
        compressed, lookup = self.embeddings(patches, self._compressed_grid(grid, settings))
        all_hidden_states: tuple[Tensor | None, ...] = (lookup if 0 in wanted else None,)
        all_attentions: tuple[Tensor, ...] = ()
        for index, layer in enumerate(self.layers, start=1):
            compressed, lookup, weights = layer(compressed, lookup, output_attentions)
            all_hidden_states += (lookup if index in wanted else None,)
            all_attentions += (weights,)
        output = LookupViTModelOutput(
            last_hidden_state=lookup,
            hidden_states=all_hidden_states if wanted else None,
            attentions=all_attentions if output_attentions else None,
            compressed_hidden_state=compressed,
        )
        return output, grid

    def _compressed_grid(self, grid: Grid, settings: Any) -> Grid:
        given = settings is not self.config
        if not self.training or given or torch.compiler.is_compiling():
            return compressed_grid(grid, settings.compressed_size)
        fitting = self.config.fitting_sizes(grid)
        return fitting[int(torch.randint(len(fitting), ()))]


class LookupViTBackbone(BackboneMixin, LookupViTModel):
    """`LookupViTModel` as a backbone for images: feature maps of the lookup tokens at `config.out_features`."""

    def __init__(self, config: LookupViTConfig):
        _check_frames(self, config, video=False)
        super().__init__(config, add_compressed_norm=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Arguments as in `LookupViTModel`. Feature maps are (batch_size, hidden_size, rows, columns) on the patch
        grid, or (batch_size, 1 + N, hidden_size) with `config.reshape_hidden_states=False`; the final norm is applied
        unless `config.apply_layernorm=False`."""
        requested = wanted_states(self.config, output_hidden_states, len(self.layers) + 1)
        stages = [self.stage_names.index(name) for name in self.out_features]
        output, grid = self._run_blocks(pixel_values, kwargs, sorted({*requested, *stages}), output_attentions)
        return BackboneOutput(
            feature_maps=tuple(self._feature_map(output.hidden_states[stage], grid) for stage in stages),
            hidden_states=tuple(h if i in requested else None for i, h in enumerate(output.hidden_states))
            if requested
            else None,
            attentions=output.attentions,
        )

    def _feature_map(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        if self.config.apply_layernorm:
            hidden_states = self.layernorm(hidden_states)
        if not self.config.reshape_hidden_states:
            return torch.cat([hidden_states.mean(1, keepdim=True), hidden_states], dim=1)
        return hidden_states.transpose(1, 2).unflatten(2, grid).contiguous()


class LookupViTForSemanticSegmentation(LookupViTPreTrainedModel):
    """LookupViT with Segmenter's linear head on the lookup tokens."""

    def __init__(self, config: LookupViTConfig):
        _check_frames(self, config, video=False)
        name_foreground(config)
        super().__init__(config)
        self.lookupvit = LookupViTModel(config, add_compressed_norm=False)
        self.decode_head = AiluRusLinearHead(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: (batch_size, num_channels, height, width), any height and width of at least one patch.
            labels: (batch_size, height, width) int64, class of each pixel; `config.semantic_loss_ignore_index` marks
                pixels that the loss leaves out.
            kwargs: as in `LookupViTModel`, `output_hidden_states` and `output_attentions` among them.
        """
        output = self.lookupvit(pixel_values, **{**kwargs, "return_dict": True})
        height, width = pixel_values.shape[-2:]
        grid, side = self.config.patch_grid(height, width), self.config.patch_size
        logits = self.decode_head(output.last_hidden_state, grid)
        # The padding that filled the last patches is upsampled with the rest and cut off.
        size = (grid[0] * side, grid[1] * side)
        logits = F.interpolate(logits, size=size, mode="bilinear")[..., :height, :width]
        return SemanticSegmenterOutput(
            loss=None if labels is None else segmentation_loss(self, logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class LookupViTForImageClassification(LookupViTPreTrainedModel):
    """LookupViT with a linear classifier on the pooled output, see `config.pooling`."""

    video = False

    def __init__(self, config: LookupViTConfig):
        _check_frames(self, config, video=self.video)
        super().__init__(config)
        self.lookupvit = LookupViTModel(config, add_compressed_norm=config.pooling != "lookup")
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Classify images, or videos.

        Args:
            pixel_values: as in `LookupViTModel`.
            labels: (batch_size,) int64, class of each image; or float, see `config.problem_type`.
            kwargs: as in `LookupViTModel`, `output_hidden_states` and `output_attentions` among them.
        """
        output = self.lookupvit(pixel_values, **{**kwargs, "return_dict": True})
        logits = self.classifier(output.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class LookupViTForVideoClassification(LookupViTForImageClassification):
    """LookupViT of video, `config.num_frames` above 1, with a linear classifier on the pooled output."""

    video = True


def _check_frames(model: nn.Module, config: LookupViTConfig, *, video: bool) -> None:
    name = type(model).__name__
    if video and config.num_frames == 1:
        raise ValueError(f"num_frames must be at least 2 for {name}, got 1; set the frames of a video in training")
    if not video and config.num_frames > 1:
        raise ValueError(f"num_frames must be 1 for {name}, which takes images, got {config.num_frames}")


__all__ = [
    "LookupViTBackbone",
    "LookupViTForImageClassification",
    "LookupViTForSemanticSegmentation",
    "LookupViTForVideoClassification",
    "LookupViTModel",
    "LookupViTPreTrainedModel",
]
