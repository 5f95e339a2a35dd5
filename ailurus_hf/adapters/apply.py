"""Making models of transformers adaptive, in place, and putting them back."""

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..modeling.settings import AdaptiveResolutionMixin, as_stored, make_settings, names_of, refuse_unknown, replaced_by
from .controller import EncoderController, controllers_of
from .families import FAMILIES, UNSUPPORTED, FamilySpec
from .map_layers import MapController


def apply_ailurus(
    model: nn.Module,
    cluster_layer: int | None = None,
    keep_ratio: float | None = None,
    *,
    family: str | FamilySpec | None = None,
    **settings: Any,
) -> nn.Module:
    """Make every known vision encoder in a transformers model run its later layers on fewer tokens.

    The model is changed in place, by hooks: classes, parameters, checkpoints and the shapes of all outputs stay as
    they are, and `remove_ailurus` puts it back exactly. The settings are those of `AiluRusConfig`. They are stored in
    `model.config.ailurus`, a plain dictionary that travels with `save_pretrained`, and read there on every forward:
    `model.config.ailurus["keep_ratio"] = 0.25` holds from the next one on. A setting that is not given comes from
    there where it exists, so `apply_ailurus(model)` makes a reloaded model adaptive as it was, and applying again
    changes settings only. An encoder inside a larger model, such as the backbone of a depth estimator, is found
    wherever it sits; a model with several is adapted in all of them, with the same settings.

    Args:
        model: a model of transformers, or a submodel of one.
        cluster_layer: number of layers that run on all tokens before the tokens are grouped; by default
            what the method does best with.
        keep_ratio: share of patch tokens kept, above 0 and at most 1; at 1 nothing is merged; 0.5 by default. It
            takes the place of a stored `num_clusters` or `places`, which would win over it.
        family: name of a family, where only its encoders are to be adapted, or a `FamilySpec`, the row of an encoder
            that the table lacks.
        settings: the other settings, `grouping`, `num_clusters` and so on, with the defaults of `AiluRusConfig`.

    Returns:
        The model that was given.

    Raises:
        TypeError: the model has no transformers configuration, `family` is of another type, or there is no such
            setting.
        ValueError: it holds no vision encoder, or none of a family in the table; or a setting is out of range; or its
            encoders keep different settings.
    """
    config = _config_of(model)
    refuse_unknown("apply_ailurus", settings, names_of(AdaptiveResolutionMixin()))
    named = {"cluster_layer": cluster_layer, "keep_ratio": keep_ratio}
    given = settings | {name: value for name, value in named.items() if value is not None}
    known = controllers_of(model)
    adapted = {id(controller.owner) for controller in known}
    fresh = [
        (MapController if spec.map_layer else EncoderController)(module, spec, config)
        for module, spec in _encoders(model, family)
        if id(module) not in adapted
    ]
    if not known and not fresh:
        raise ValueError(_nothing_found(model, family))
    stored = _stored(config, [*known, *fresh])
    for name in replaced_by(given):
        stored.pop(name, None)
    settings = asdict(make_settings(stored | given))
    for controller in [*known, *fresh]:
        controller.segments(make_settings(settings))  # raises before anything is changed
    _forget_settings(model)
    config.ailurus = settings
    for controller in known:
        controller.config = config
    for controller in fresh:
        controller.install()
    return model


def remove_ailurus(model: nn.Module) -> nn.Module:
    """Put a model changed by `apply_ailurus` back: outputs bit for bit as before, no hook and no setting left.

    A model that is not adapted is left alone.

    Returns:
        The model that was given.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    for controller in controllers_of(model):
        controller.remove()
    _forget_settings(model)
    return model


def supported_families() -> tuple[str, ...]:
    """Names of the families of vision encoders that `apply_ailurus` knows, in alphabetical order."""
    return tuple(sorted(spec.family for spec in FAMILIES))


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"model must be a transformers model, whose config keeps the settings; {type(model).__name__} has none: "
            "give the transformers model inside it"
        )
    return config


def _stored(config: Any, controllers: list[EncoderController]) -> dict[str, Any]:
    """The settings that the model keeps; or its encoders, where each was adapted by itself.

    Raises:
        ValueError: the encoders keep different ones.
    """
    if hasattr(config, "ailurus"):
        return as_stored(config.ailurus)
    configs: list[Any] = [controller.config for controller in controllers]
    configs += [getattr(controller.owner, "config", None) for controller in controllers]
    found = [kept.ailurus for kept in configs if hasattr(kept, "ailurus")]
    if any(settings != found[0] for settings in found):
        raise ValueError(
            "the encoders of this model keep different settings, and they would get the same: call apply_ailurus on "
            "each encoder instead, or remove_ailurus(model) first"
        )
    return as_stored(found[0]) if found else {}


def _forget_settings(model: nn.Module) -> None:
    """Remove the settings from the configurations of the model and of the models inside it."""
    for config in (getattr(module, "config", None) for module in model.modules()):
        if isinstance(config, PreTrainedConfig):
            vars(config).pop("ailurus", None)


def _encoders(model: nn.Module, family: str | FamilySpec | None) -> list[tuple[nn.Module, FamilySpec]]:
    """All vision encoders in the model that one of the rows describes, each with its row."""
    if family is not None and not isinstance(family, str | FamilySpec):
        raise TypeError(f"family must be the name of a family or a FamilySpec, got {type(family).__name__}")
    rows = (family,) if isinstance(family, FamilySpec) else FAMILIES
    if isinstance(family, str):
        rows = tuple(row for row in FAMILIES if row.family == family)
        if not rows:
            raise ValueError(f"family must be one of {', '.join(supported_families())}, got {family!r}; {_OWN_ROW}")
    return [(module, row) for module in model.modules() for row in rows if row.owns(module)]


_OWN_ROW = (
    "an encoder that the table lacks takes a row of its own, family=FamilySpec(...), which "
    "ailurus_hf.adapters.probe(model, pixel_values) tries to find"
)


def _nothing_found(model: nn.Module, family: str | FamilySpec | None) -> str:
    name = type(model).__name__
    if isinstance(family, FamilySpec):
        return f"{name} holds no module of class {' or '.join(family.owners)}, which family={family.family!r} names"
    if not any("image" in _modalities(module) or "video" in _modalities(module) for module in model.modules()):
        return f"{name} has no vision encoder: apply_ailurus merges the patch tokens of images"
    for module in model.modules():
        reason = UNSUPPORTED.get(type(module).__name__)
        if reason is not None:
            return f"{type(module).__name__} is not supported: {reason}. Supported: {', '.join(supported_families())}"
    if family is not None:
        return f"{name} holds no encoder of family {family!r}; leave family out to adapt whatever the table knows"
    return f"{name} holds no encoder of a known family ({', '.join(supported_families())}); {_OWN_ROW}"


def _modalities(module: nn.Module) -> tuple[str, ...]:
    modalities = getattr(module, "input_modalities", ())
    return (modalities,) if isinstance(modalities, str) else tuple(modalities or ())
