"""Which vision encoders of transformers can be adapted: one row each.

To add a family, add a row to `FAMILIES` and its few lines to `tests/adapters/test_families.py`, whose shared tests then
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
   interface, `MaskBias()` where only an additive mask gets there.
7. *What knows about positions inside the layers?* `positions`: nothing for positions added to the embeddings,
   `RotaryPositions()` for rotary tables handed to every layer. For another kind, write a subclass of `MergedArguments`.
8. *Does anything between the layers count tokens?* `segments`: the stretches of layers that run on merged tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..modeling.configuration_ailurus import AdaptiveResolutionMixin
from .arguments import KeyBias, MergedArguments, RotaryPositions


def grid_of_convolution(output: Tensor) -> tuple[int, ...]:
    """Grid of the patches, from the output (batch_size, hidden_size, *grid) of the convolution that makes them."""
    return tuple(output.shape[2:])


def one_segment(settings: AdaptiveResolutionMixin, num_layers: int, config: Any) -> Sequence[range]:
    """All layers from `cluster_layer` to the dense tail."""
    return (settings.merged_layers(num_layers),)


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
        grid: output of `patches` -> sizes of the grid's axes, (height, width) or (time, height, width).
        order: path to a module whose output holds the tokens' order, and its place in that output: (batch_size, N)
            int64, for each patch of the grid the place of its token in the sequence. None: the grid's own order.
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
    grid: Callable[[Any], tuple[int, ...]] = grid_of_convolution
    order: tuple[str, int] | None = None

    def owns(self, module: nn.Module) -> bool:
        """Whether the module is an encoder of this family."""
        return any(base.__name__ in self.owners for base in type(module).__mro__)


_VIT_PATCHES = ("embeddings.patch_embeddings.projection",)
_HYBRID_PATCHES = (*_VIT_PATCHES, "embeddings.projection")

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
)
