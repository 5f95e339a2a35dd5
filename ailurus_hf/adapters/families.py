"""Which vision encoders of transformers can be adapted: one row each.

To add a family, add a row to `FAMILIES` and a `Case` to `tests/adapters/test_more_encoders.py`; the shared tests then
check everything the row promises. A row answers, in this order:

1. *Which module is the encoder?* `owners`: names of the classes that hold both the patch embedding and the layers.
   Every module of such a class is adapted, wherever it sits in the user's model: a model that reads the feature maps
   of a backbone needs no row, its backbone does.
2. *Where are the layers?* `layers`: path of the `nn.ModuleList` from the owner.
3. *Where do patches become tokens?* `patches`: path of the convolution whose output (batch_size, hidden_size, *grid)
   has one position per patch. The grid is measured there on every forward. Another kind of module: give `grid` as well.
4. *Who hands out the hidden states?* `taps`: path of the module whose output has them, which is the one that carries
   `capture_outputs`; "" for the owner itself.
5. *Which tokens are no patches?* What precedes the patches is measured: the length of the sequence less grid and
   suffix. `suffix` names the entry of the owner's config with the number of tokens behind the patches.
6. *How do sizes reach the attention?* `bias`: `KeyBias()` where layers hand their keyword arguments to the attention
   interface, `MaskBias()` where only an additive mask gets there, `RelativeKeyBias()` where layers add a bias between
   all pairs of tokens. `inner.py` has those for attention modules that take nothing from outside.
7. *What knows about positions inside the layers?* `positions`: nothing for positions added to the embeddings,
   `RotaryPositions()` for rotary tables handed to every layer. For another kind, write a subclass of `MergedArguments`.
8. *Does anything between the layers count tokens?* `segments`: the stretches of layers that run on merged tokens.
9. *Do layers take maps and nothing else?* `map_layer`: names of the modules in a layer, each merged inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..modeling.settings import AdaptiveResolutionMixin
from .arguments import KeyBias, MaskBias, MergedArguments, RelativeKeyBias, RotaryPositions
from .inner import InnerKeyBias, InnerRelativeBias, InnerRotaryBias, PackedPositions


def grid_of_convolution(output: Tensor, config: Any) -> tuple[int, ...]:
    """Grid of the patches, from the output (batch_size, hidden_size, *grid) of the convolution that makes them."""
    return tuple(output.shape[2:])


def global_layers(settings: AdaptiveResolutionMixin, num_layers: int, config: Any) -> Sequence[range]:
    """Each layer with global attention by itself; the windows between them need the whole grid.

    Raises:
        ValueError: the settings leave no such layer.
    """
    if hasattr(config, "global_attn_indexes"):
        with_global = sorted(index % num_layers for index in config.global_attn_indexes)
    else:  # ViTDet names the others
        windows = config.window_block_indices if config.window_size > 0 else ()
        with_global = [index for index in range(num_layers) if index not in windows]
    merged = settings.merged_layers(num_layers)
    chosen = [range(index, index + 1) for index in with_global if index in merged]
    if not chosen:
        raise ValueError(
            f"cluster_layer={settings.num_dense_layers} and tail_layers={settings.tail_layers} must leave a layer with "
            f"global attention, which are {with_global}: only those run on merged tokens, the windows between them "
            "need the whole grid"
        )
    return chosen


def grid_of_window(name: str) -> Callable[[Any, Any], tuple[int, ...]]:
    """Grid of one window, for encoders that fold the windows into the batch and cluster within each.

    Args:
        name: entry of the config with the number of windows along each side.
    """

    def grid(output: Tensor, config: Any) -> tuple[int, ...]:
        windows = getattr(config, name)
        return output.shape[2] // windows, output.shape[3] // windows

    return grid


def grid_of_pixels(output: Tensor, config: Any) -> tuple[int, ...]:
    """Grid of the patches, from pixels (batch_size, num_channels, height, width) on their way to the embedding."""
    return output.shape[2] // config.patch_size, output.shape[3] // config.patch_size


def before_queries(settings: AdaptiveResolutionMixin, num_layers: int, config: Any) -> Sequence[range]:
    """Layers from `cluster_layer` to where EoMT's queries join the sequence; the dense tail is counted from there."""
    return (settings.merged_layers(num_layers - config.num_blocks),)


def one_segment(settings: AdaptiveResolutionMixin, num_layers: int, config: Any) -> Sequence[range]:
    """All layers from `cluster_layer` to the dense tail."""
    return (settings.merged_layers(num_layers),)


@dataclass(frozen=True)
class MapLayer:
    """Where a layer that takes maps (batch_size, height, width, hidden_size) has the modules that merging goes around.

    Args:
        attention: path to its attention module, which has `qkv`, `proj` and `scale`.
        norm1: path to the norm before that.
        norm2: path to the norm before the feed-forward network.
        mlp: path to the feed-forward network.
        num_heads: name of the attention module's attribute for the number of heads.
    """

    attention: str
    norm1: str
    norm2: str
    mlp: str = "mlp"
    num_heads: str = "num_attention_heads"


@dataclass(frozen=True)
class FamilySpec:
    """How one family of vision encoders is adapted; see the description of this file for every field.

    Args:
        family: name of the family, as in `supported_families()`.
        owners: class names of the encoders.
        layers: path from the owner to the list of layers.
        patches: path from the owner to the module that makes patch tokens; of several, the first that exists.
        taps: path from the owner to the module whose output hands out the hidden states.
        suffix: name of the config entry with the number of tokens behind the patches; "" for none.
        bias: how layers learn the sizes of merged tokens.
        positions: how layers learn the positions of merged tokens.
        segments: (settings, number of layers, the owner's config) -> stretches of layers that run on merged tokens.
        grid: (output of `patches`, the owner's config) -> sizes of the grid's axes, (height, width) or (time, height,
            width).
        order: path to a module whose output holds the tokens' order, and its place in that output: (batch_size, N)
            int64, for each patch of the grid the place of its token in the sequence. None: the grid's own order.
        fixed: arguments of the module at `taps` that have one value while the encoder is adapted.
        tables: path to a module, if the encoder has it, whose output (number of layers - 1, 1, T, hidden_size) is added
            to the sequence after every layer but the last; "" for none.
        maps: whether hidden states are (batch_size, height, width, hidden_size); merged ones are (batch_size, 1, M,
            hidden_size).
        map_layer: for layers that take such a map and nothing else: tokens are merged inside each of them, see
            `map_layers.py`. Of the other fields those for the encoder count, and `segments`.
    """

    family: str
    owners: tuple[str, ...]
    layers: str
    patches: tuple[str, ...]
    taps: str = ""
    suffix: str = ""
    bias: MergedArguments = field(default_factory=KeyBias)
    positions: MergedArguments = field(default_factory=MergedArguments)
    segments: Callable[[AdaptiveResolutionMixin, int, Any], Sequence[range]] = one_segment
    grid: Callable[[Any, Any], tuple[int, ...]] = grid_of_convolution
    order: tuple[str, int] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tables: str = ""
    maps: bool = False
    map_layer: MapLayer | None = None

    def owns(self, module: nn.Module) -> bool:
        """Whether the module is an encoder of this family."""
        return any(base.__name__ in self.owners for base in type(module).__mro__)

    def norm_of(self, layer: nn.Module) -> nn.Module | None:
        """The norm before a layer's attention, if it has one of the usual names."""
        return next((getattr(layer, name) for name in _NORMS if hasattr(layer, name)), None)


_NORMS = ("layernorm_before", "norm1", "layer_norm1")
_VIT_PATCHES = ("embeddings.patch_embeddings.projection",)
_CLIP_PATCHES = ("embeddings.patch_embedding",)
_HYBRID_PATCHES = (*_VIT_PATCHES, "embeddings.projection")
_SAM_PATCHES = ("patch_embed.projection",)
_SAM_LAYER = MapLayer("attn", "layer_norm1", "layer_norm2")

FAMILIES: tuple[FamilySpec, ...] = (
    FamilySpec("vit", ("ViTModel",), "layers", _VIT_PATCHES),
    FamilySpec("deit", ("DeiTModel",), "layers", _VIT_PATCHES),
    # Its embeddings shuffle the patches, and with a mask_ratio above 0 drop some: those have no grid and are refused.
    FamilySpec("vit_mae", ("ViTMAEModel",), "layers", _VIT_PATCHES, order=("embeddings", 2)),
    FamilySpec("vit_msn", ("ViTMSNModel",), "layers", _VIT_PATCHES),
    FamilySpec("ijepa", ("IJepaModel",), "layers", _VIT_PATCHES),
    FamilySpec("pixio", ("PixioModel",), "layers", _VIT_PATCHES),
    FamilySpec("dinov2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", _VIT_PATCHES, taps="encoder"),
    FamilySpec(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "encoder.layer",
        _VIT_PATCHES,
        taps="encoder",
    ),
    FamilySpec(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "model.layer",
        ("embeddings.patch_embeddings",),
        taps="model",
        positions=RotaryPositions(),
    ),
    FamilySpec("dpt", ("DPTModel",), "encoder.layer", _HYBRID_PATCHES),
    # The image towers of two-tower models.
    FamilySpec("clip", ("CLIPVisionModel",), "encoder.layers", _CLIP_PATCHES),
    FamilySpec("clipseg", ("CLIPSegVisionModel",), "encoder.layers", _CLIP_PATCHES),
    FamilySpec("siglip", ("SiglipVisionModel",), "encoder.layers", _CLIP_PATCHES, bias=MaskBias()),
    FamilySpec("owlvit", ("OwlViTVisionTransformer",), "encoder.layers", _CLIP_PATCHES),
    FamilySpec("owlv2", ("Owlv2VisionTransformer",), "encoder.layers", _CLIP_PATCHES),
    FamilySpec("vitpose_backbone", ("VitPoseBackbone",), "encoder.layer", _VIT_PATCHES, taps="encoder"),
    FamilySpec(
        "sapiens2",
        ("Sapiens2Model", "Sapiens2Backbone"),
        "model.layer",
        ("embeddings.patch_embeddings",),
        taps="model",
        positions=RotaryPositions(),
    ),
    FamilySpec("tipsv2", ("Tipsv2VisionModel", "Tipsv2VisionBackbone"), "encoder.layer", _VIT_PATCHES, taps="encoder"),
    # It cuts patches without a convolution; the module before that normalises the pixels.
    FamilySpec("radio", ("RadioModel",), "encoder.layer", ("input_conditioner",), taps="encoder", grid=grid_of_pixels),
    FamilySpec("beit", ("BeitModel",), "layers", _VIT_PATCHES, bias=RelativeKeyBias()),
    FamilySpec(
        "yolos",
        ("YolosModel",),
        "encoder.layer",
        _VIT_PATCHES,
        suffix="num_detection_tokens",
        tables="encoder.interpolation",
    ),
    FamilySpec(
        "eomt", ("EomtForUniversalSegmentation",), "layers", _VIT_PATCHES, bias=MaskBias(), segments=before_queries
    ),
    FamilySpec(
        "eomt_dinov3",
        ("EomtDinov3ForUniversalSegmentation",),
        "layers",
        ("embeddings.patch_embeddings",),
        bias=MaskBias(),
        positions=RotaryPositions(),
        segments=before_queries,
    ),
    FamilySpec(
        "data2vec_vision",
        ("Data2VecVisionModel",),
        "encoder.layer",
        _VIT_PATCHES,
        taps="encoder",
        bias=InnerRelativeBias(),
        # Layers would resize the bias, which is made for the image's grid, to the number of tokens they have.
        fixed={"interpolate_pos_encoding": False},
    ),
    # Videos: neighbours on the (time, height, width) grid.
    FamilySpec(
        "videomae",
        ("VideoMAEModel",),
        "encoder.layer",
        _VIT_PATCHES,
        bias=InnerKeyBias(attention="attention.attention"),
    ),
    FamilySpec(
        "vjepa2",
        ("VJEPA2Model",),
        "encoder.layer",
        ("encoder.embeddings.patch_embeddings.proj",),
        bias=PackedPositions(attention="attention"),
    ),
    FamilySpec(
        "lw_detr",
        ("LwDetrViTBackbone",),
        "encoder.layer",
        ("embeddings.projection",),
        taps="encoder",
        grid=grid_of_window("num_windows_side"),
    ),
    # Merged around, or inside, each layer with global attention; those in windows run on the whole grid.
    FamilySpec("sam", ("SamVisionEncoder",), "layers", _SAM_PATCHES, segments=global_layers, map_layer=_SAM_LAYER),
    FamilySpec("sam_hq", ("SamHQVisionEncoder",), "layers", _SAM_PATCHES, segments=global_layers, map_layer=_SAM_LAYER),
    FamilySpec(
        "vitdet",
        ("VitDetModel", "VitDetBackbone"),
        "encoder.layer",
        ("embeddings.projection",),
        taps="encoder",
        segments=global_layers,
        map_layer=MapLayer("attention", "norm1", "norm2", num_heads="num_heads"),
    ),
    FamilySpec(
        "sam3",
        ("Sam3ViTModel",),
        "layers",
        _VIT_PATCHES,
        bias=InnerRotaryBias(attention="attention"),
        segments=global_layers,
        maps=True,
    ),
    FamilySpec(
        "rf_detr",
        ("RfDetrDinov2Backbone",),
        "encoder.layer",
        _VIT_PATCHES,
        taps="encoder",
        grid=grid_of_window("num_windows"),
    ),
)

# Encoders that are known, and why they have no row: class name -> reason.
UNSUPPORTED: dict[str, str] = {
    "HieraModel": "its tokens are pooled and reordered between the layers",
    "PvtModel": "its tokens are pooled between the layers",
    "PvtV2Model": "its tokens are pooled between the layers",
    "SegformerModel": "its stages are no plain sequence; convert the checkpoint instead: `ailurus-hf convert auto`",
    "Siglip2VisionModel": "its batches hold images of different grids, padded",
    "SwinModel": "it runs in shifted windows, and merges patches between its stages",
    "Swinv2Model": "it runs in shifted windows, and merges patches between its stages",
    "TimesformerModel": "its attention is divided into time and space",
}
