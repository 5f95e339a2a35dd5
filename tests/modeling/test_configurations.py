"""Every field of every configuration against values that make no sense: refused by name, or rightly accepted."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ailurus_hf import AiluRusConfig, AiluRusSegformerConfig, LookupViTConfig
from ailurus_hf.modeling.configuration_ailurus import AiluRusDecodeHeadConfig
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings, make_settings

CONFIGS = [AiluRusConfig, AiluRusDecodeHeadConfig, AiluRusSegformerConfig, LookupViTConfig]
INHERITED = {field.name for field in fields(PreTrainedConfig)}  # transformers' own business
FIELDS = [
    pytest.param(config, field.name, id=f"{config.__name__}.{field.name}")
    for config in CONFIGS
    for field in fields(config)
    if field.name not in INHERITED and not field.name.startswith("_")
]
HOSTILE = [math.nan, math.inf, -math.inf, -1, -0.5, 1e300, "x", "", [], [math.nan], [-1], [0], [[]], {"a": 1}, b"x", 1j]
# Where a value of the list means something.
NEGATIVE = {"semantic_loss_ignore_index", "position_offset", "layerscale_value"}
ANY_SIZE = {"initializer_range", "layer_norm_eps", "patch_norm_eps", "reduction_norm_eps", "batch_norm_eps"}


def made(config_class, **settings):
    """A configuration and None, or None and why it was refused."""
    try:
        return config_class(**settings), None
    except (StrictDataclassError, ValueError) as error:
        return None, str(error)


@pytest.mark.parametrize(("config_class", "name"), FIELDS)
def test_hostile_values(config_class, name):
    for value in HOSTILE:
        config, refusal = made(config_class, **{name: value})
        if refusal is not None:
            assert name in refusal, (value, refusal)
            continue
        stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
        assert type(config).from_dict(stored).to_dict() == config.to_dict(), value
        number = value if isinstance(value, int | float) else None
        assert number is None or number >= 0 or name in NEGATIVE, (name, value)
        assert number != 1e300 or name in NEGATIVE | ANY_SIZE | {"lookup_mlp_divisor", "mlp_ratio"}, (name, value)


@pytest.mark.parametrize("config_class", CONFIGS[:1] + CONFIGS[2:])
def test_a_near_miss_of_a_name_is_warned_of(config_class):
    with pytest.warns(UserWarning, match="no field 'hidden_dropout_prop', .* did you mean 'hidden_dropout_prob'"):
        config_class(hidden_dropout_prop=0.1)
    config_class(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, my_own_note="kept")
    with pytest.warns(UserWarning, match="did you mean 'keep_ratio'"):
        AiluRusConfig(keep_ration=0.3)


@pytest.mark.parametrize("config_class", [AiluRusConfig, AiluRusSegformerConfig, LookupViTConfig])
def test_numbers_of_numpy(config_class):
    config = config_class(
        num_channels=np.int64(4),
        hidden_dropout_prob=np.float32(0.25),
        qkv_bias=np.bool_(False),
        palette=[list(np.array([1, 2, 3], np.uint8))] * 2,
    )
    config.layer_norm_eps = np.float32(0.5)
    plain = config_class(num_channels=4, hidden_dropout_prob=0.25, qkv_bias=False, palette=[[1, 2, 3]] * 2)
    plain.layer_norm_eps = 0.5
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(plain.to_dict()))
    with pytest.raises(StrictDataclassError, match="num_channels"):
        config_class(num_channels=np.int64(-1))


def test_settings_take_numbers_of_numpy():
    settings = AdaptiveResolutionSettings(keep_ratio=np.float32(0.5), places=[[np.int64(1), np.float64(0.5)]])
    assert (type(settings.keep_ratio), settings.places) == (float, [[1, 0.5]])
    assert make_settings({"num_clusters": np.int32(7)}).num_clusters == 7
