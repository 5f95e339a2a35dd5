import copy
import json
import math
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSemanticSegmentation, UperNetConfig, ViTConfig, ViTModel

import ailurus_hf
from ailurus_hf import (
    AiluRusConfig,
    AiluRusForSemanticSegmentation,
    AiluRusSegformerConfig,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.modeling.settings import AdaptiveResolutionMixin
from tests.factories import random_images, tiny_config, tiny_segformer_config

DEMO = Path(ailurus_hf.__file__).parent / "demo" / "checkpoint"

BAD_SETTINGS = [
    ({"keep_ratio": 0}, "above 0 and at most 1, got 0"),
    ({"keep_ratio": -0.5}, "above 0 and at most 1, got -0.5"),
    ({"keep_ratio": 1.5}, "above 0 and at most 1, got 1.5"),
    ({"keep_ratio": math.nan}, "above 0 and at most 1, got nan"),
    ({"keep_ratio": "half"}, "expected float, got str (value: 'half')"),
    ({"num_clusters": 0}, "at least 1, got 0"),
    ({"num_clusters": 3.0}, "expected int, got float (value: 3.0)"),
    ({"cluster_layer": -1}, "at least 0, got -1"),
    ({"num_neighbors": 0}, "at least 1, got 0"),
    ({"neighborhood_size": 0}, "at least 1, got 0"),
    ({"spatial_alpha": 1.1}, "between 0 and 1, got 1.1"),
    ({"spatial_alpha": math.nan}, "between 0 and 1, got nan"),
    ({"unfold": "sum"}, "one of 'residual', 'copy', got 'sum'"),
    ({"tail_layers": -1}, "at least 0, got -1"),
    ({"decoder_type": "fpn"}, "one of 'linear', 'mask_transformer', 'progressive_upsampling', got 'fpn'"),
    ({"decoder_hidden_size": 0}, "at least 1, got 0"),
    ({"decoder_kernel_size": 2}, "must be odd and above 0, got 2"),
    ({"decoder_kernel_size": -1}, "must be odd and above 0, got -1"),
    ({"decoder_upscale": 0}, "at least 1, got 0"),
    ({"position_interpolation": "nearest"}, "one of 'bicubic', 'bilinear', got 'nearest'"),
    ({"patch_size": 0}, "at least 1, got 0"),
    ({"pooling": "max"}, "one of 'cls', 'mean', 'cls_mean', None, got 'max'"),
    ({"logits_resize": "pad"}, "one of 'crop', 'squeeze', got 'pad'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=lambda value: str(value))
def test_refuses_bad_values_at_construction_and_assignment(settings, message):
    [(name, value)] = settings.items()
    expected = rf"(?s)'{name.removeprefix('decoder_')}'.*{re.escape(message)}"
    with pytest.raises(StrictDataclassError, match=expected):
        tiny_config(**settings)
    with pytest.raises(StrictDataclassError, match=expected):
        setattr(tiny_config(), name, value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_layer": 4}, "at most 3, got 4"),
        ({"cluster_layer": 2, "tail_layers": 2}, "tail_layers=2 it must be at most 1, got 2"),
        ({"num_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads=5, got 32"),
        ({"image_size": (48, 7)}, "image_size must hold at least one patch of patch_size=8, got (48, 7)"),
        ({"num_prefix_positions": 2}, "num_prefix_positions must be at most the number of prefix tokens 1, got 2"),
        ({"palette": [[0, 0, 0]]}, "palette must have a colour for each of the num_labels=5 classes, got 1"),
        ({"pooling": "cls", "use_cls_token": False}, "pooling must be 'mean' or None when use_cls_token=False"),
        ({"pooling": "cls_mean", "use_cls_token": False}, "use_cls_token=False, got 'cls_mean'"),
        ({"use_distillation_classifier": True}, "needs use_distillation_token=True"),
    ],
    ids=str,
)
def test_refuses_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        tiny_config(**settings)


def test_round_trip_keeps_every_field(tmp_path):
    config = tiny_config(
        keep_ratio=0.25,
        image_size=(64, 32),
        num_clusters=7,
        num_labels=2,
        id2label={0: "a", 1: "b"},
        out_features=["stage2"],
    )
    config.save_pretrained(tmp_path)
    loaded = AiluRusConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "image_size": None} == {**config.to_dict(), "image_size": None}
    assert loaded.grid_size == (8, 4)
    assert loaded.id2label == {0: "a", 1: "b"}


def test_the_settings_and_their_defaults():
    defaults = {
        "grouping": "region_merging", "cluster_layer": None, "keep_ratio": 0.5, "num_clusters": None,
        "num_neighbors": 1, "neighborhood_size": 50, "spatial_alpha": 0.9, "unfold": "residual", "tail_layers": 0,
        "places": None, "grouping_features": None,
    }  # fmt: skip
    assert [field.name for field in fields(AdaptiveResolutionMixin)] == list(defaults)
    config = AiluRusConfig()
    assert {name: getattr(config, name) for name in defaults} == defaults


def test_files_from_before_there_was_a_choice_keep_density_peaks(tmp_path):
    """The demo checkpoint as it was shipped then: no `grouping`, two dense layers."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("grouping") == "region_merging"
    images = random_images(1, 64, 128)
    explicit = AiluRusForSemanticSegmentation.from_pretrained(DEMO, grouping="density_peaks", cluster_layer=2).eval()
    for cluster_layer in ({"cluster_layer": 2}, {}):
        old = {name: value for name, value in stored.items() if name != "cluster_layer"} | cluster_layer
        (tmp_path / "config.json").write_text(json.dumps(old))
        model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
        assert (model.config.grouping, model.config.num_dense_layers) == ("density_peaks", 2)
        assert torch.equal(model(images).logits, explicit(images).logits)
        assert AiluRusConfig.from_pretrained(tmp_path, grouping="grid").grouping == "grid"
        model.save_pretrained(tmp_path / "again")
        assert AiluRusConfig.from_pretrained(tmp_path / "again").grouping == "density_peaks"
    backbone = {**tiny_config().to_dict(), "cluster_layer": 2}
    del backbone["grouping"]
    assert UperNetConfig(backbone_config=backbone).backbone_config.grouping == "density_peaks"
    hierarchical = tiny_segformer_config().to_dict()
    del hierarchical["grouping"]
    assert AiluRusSegformerConfig.from_dict(hierarchical).grouping == "density_peaks"
    vit = ViTModel(ViTConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=4))
    vit.config.ailurus = {"keep_ratio": 0.25}
    apply_ailurus(vit)
    assert vit.config.ailurus["grouping"] == "density_peaks"
    assert apply_ailurus(remove_ailurus(vit)).config.ailurus["grouping"] == "region_merging"


def test_new_files_name_their_method(tmp_path):
    AiluRusConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["grouping"] == "region_merging"
    assert AiluRusConfig.from_pretrained(tmp_path).num_dense_layers == 1


def test_what_is_given_to_from_pretrained_takes_the_place_of_what_is_stored(tmp_path):
    tiny_config(num_clusters=10, places=[[1, 0.5]]).save_pretrained(tmp_path)
    loaded = AiluRusConfig.from_pretrained(tmp_path, keep_ratio=0.25)
    assert (loaded.num_clusters, loaded.places, loaded.num_groups(36)) == (None, None, 9)
    tiny_config(keep_ratio=1.0).save_pretrained(tmp_path / "dense")
    loaded = AiluRusConfig.from_pretrained(tmp_path / "dense", places=[[1, 0.5]])
    assert (loaded.keep_ratio, loaded.num_groups(36)) == (0.5, 18)
    loaded = AiluRusConfig.from_pretrained(tmp_path, num_clusters=4)
    assert (loaded.places, loaded.num_groups(36)) == (None, 4)


@pytest.mark.parametrize(("size", "grid"), [((48, 48), (6, 6)), ((49, 8), (7, 1)), ((1, 17), (1, 3))])
def test_patch_grid_covers_the_image(size, grid):
    assert tiny_config().patch_grid(*size) == grid


def test_the_head_is_a_configuration_of_its_own(tmp_path):
    config = tiny_config(decode_head={"type": "mask_transformer", "num_layers": 3})
    config.save_pretrained(tmp_path)
    loaded = AiluRusConfig.from_pretrained(tmp_path)
    assert (loaded.decode_head.type, loaded.decode_head.num_layers) == ("mask_transformer", 3)
    loaded.decode_head.num_layers = 1
    assert config.decode_head.num_layers == 3
    with pytest.raises(StrictDataclassError, match="must be odd"):
        loaded.decode_head.kernel_size = 2


def test_fields_of_the_head_have_their_old_names(tmp_path):
    """Checkpoints from when they stood among the encoder's fields load, and code that names them works."""
    old = {"model_type": "ailurus", "decoder_type": "mask_transformer", "decoder_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = AiluRusConfig.from_pretrained(tmp_path, decoder_num_layers=1)
    assert (config.decode_head.type, config.decode_head.dropout_prob, config.decode_head.num_layers) == (
        "mask_transformer", 0.0, 1,
    )  # fmt: skip
    config.decoder_upscale = 4
    assert config.decode_head.upscale == config.decoder_upscale == 4
    assert not any(name.startswith("decoder_") for name in config.to_dict())
    with pytest.raises(AttributeError, match="has no attribute 'decoder_width'"):
        config.decoder_width  # noqa: B018
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.to_dict() == config.to_dict()
