import json
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError

from ailurus_hf import AiluRusConfig, AiluRusSegformerConfig
from ailurus_hf.modeling.settings import AdaptiveResolutionMixin
from tests.factories import tiny_segformer_config


def test_the_method_is_set_by_the_same_fields():
    names = {field.name for field in fields(AdaptiveResolutionMixin)}
    plain, segformer = AiluRusConfig(), AiluRusSegformerConfig()
    assert {name: getattr(plain, name) for name in names} == {name: getattr(segformer, name) for name in names}


@pytest.mark.parametrize(
    ("settings", "ratios"),
    [
        ({}, (1, 1, 0.5, 0.5)),
        ({"keep_ratio": 0.25}, (1, 1, 0.25, 0.25)),
        ({"stage_keep_ratios": (1, 0.5, 0.25, 1)}, (1, 0.5, 0.25, 1)),
        ({"stage_keep_ratios": [1, 0.5, 0.25, 1], "keep_ratio": 0.1}, (1, 0.5, 0.25, 1)),
        ({"stage_keep_ratios": (1, 0.5, 0.25, 1), "keep_ratio": 1}, (1, 1, 1, 1)),
    ],
)
def test_budget_of_each_stage(settings, ratios):
    assert tiny_segformer_config(**settings).stage_ratios == ratios


def test_budget_of_other_numbers_of_stages():
    three = {"depths": (2, 2, 2), "hidden_sizes": (8, 8, 8), "num_attention_heads": (1, 1, 1), "sr_ratios": (2, 2, 1)}
    three |= {"patch_sizes": (7, 3, 3), "strides": (4, 2, 2), "mlp_ratios": (4, 4, 4)}
    assert AiluRusSegformerConfig(**three, cluster_layer=1).stage_ratios == (1, 0.5, 0.5)


def test_blocks_on_merged_tokens():
    config = tiny_segformer_config(stage_keep_ratios=(1, 0.5, 0.5, 0.5))
    assert [config.merged_blocks(stage) for stage in range(4)] == [range(0), range(1, 3), range(1, 3), range(1, 2)]
    config = tiny_segformer_config(stage_keep_ratios=(1, 0.5, 0.5, 1), tail_layers=1)
    assert [config.merged_blocks(stage) for stage in range(4)] == [range(0), range(1, 2), range(1, 2), range(0)]


def test_round_trip(tmp_path):
    config = tiny_segformer_config(stage_keep_ratios=(1, 0.5, 0.25, 1), decoder_type="conv", out_indices=[0, 2])
    config.save_pretrained(tmp_path)
    again = AiluRusSegformerConfig.from_pretrained(tmp_path)
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())
    assert again.stage_ratios == config.stage_ratios
    assert again.out_features == ["stage1", "stage3"]
    assert AiluRusSegformerConfig.from_pretrained(tmp_path, keep_ratio=1).stage_ratios == (1, 1, 1, 1)


def test_grids_and_smallest_image():
    config = AiluRusSegformerConfig()
    assert config.stage_grids(512, 1024) == ((128, 256), (64, 128), (32, 64), (16, 32))
    assert config.stage_grids(50, 75) == ((13, 19), (7, 10), (4, 5), (2, 3))
    assert config.min_image_size == 29
    assert tiny_segformer_config(sr_ratios=(1, 1, 1, 8)).min_image_size == 225
    assert tiny_segformer_config(sr_ratios=(1, 1, 1, 1)).min_image_size == 1
    assert (config.patch_size, config.grid_size) == (4, (128, 128))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_keep_ratios": (1, 1, 0.5)}, "stage_keep_ratios must have a value for each of the 4 stages"),
        ({"depths": (2, 2)}, "hidden_sizes must have a value for each of the 2 stages"),
        ({"stage_keep_ratios": (1, 1, 0.5, 0)}, "must hold numbers above 0 and at most 1, got 0"),
        ({"stage_keep_ratios": (1, 1, 0.5, 1.1)}, "must hold numbers above 0 and at most 1, got 1.1"),
        ({"stage_keep_ratios": (1, 1, float("nan"), 1)}, "must hold numbers above 0 and at most 1, got nan"),
        ({"num_attention_heads": (1, 2, 5, 4)}, "hidden_sizes must be multiples of num_attention_heads"),
        ({"hidden_sizes": (16, 32, 48, 0)}, "must hold numbers above 0, got 0"),
        ({"strides": (4, 2, 0, 2)}, "must hold numbers above 0, got 0"),
        ({"decoder_type": "mlp"}, "must be one of 'linear', 'conv', got 'mlp'"),
        (
            {"cluster_layer": 2},
            "in stage 4: with depths=\\(2, 3, 3, 2\\) and tail_layers=0 it must be at most 1, got 2",
        ),
        ({"tail_layers": 1}, "in stage 4.*must be at most 0, got 1; lower it, or keep that stage dense"),
        ({"palette": [[0, 0, 0]]}, "palette must have a colour for each of the num_labels=5 classes, got 1"),
    ],
)
def test_refuses_nonsense(settings, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_segformer_config(**settings)


def test_refuses_nonsense_set_later():
    config = tiny_segformer_config()
    with pytest.raises((ValueError, StrictDataclassError), match="above 0 and at most 1"):
        config.stage_keep_ratios = (1, 1, 2, 1)
