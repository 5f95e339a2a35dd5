"""Where settings are kept, what wins, and what is refused."""

import copy

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SamVisionConfig, SamVisionModel, ViTConfig, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters import FamilySpec
from ailurus_hf.adapters.controller import controllers_of
from ailurus_hf.budget import set_keep_ratio
from tests.adapters.test_apply import IMAGES, TINY, VIT
from tests.adapters.test_maps import SAM_VISION
from tests.adapters.test_more_encoders import two_towers
from tests.adapters.tester import Case, assert_equal, checkpoint_layers, differ, gradients, outputs, tensors
from tests.factories import random_images

SAM = Case("sam", SamVisionModel, SamVisionConfig, SAM_VISION)
INPUTS = {"pixel_values": IMAGES}


@pytest.fixture
def vit():
    return VIT.model()


def test_settings_are_kept_until_given(vit):
    apply_ailurus(vit, 1, 0.25, neighborhood_size=8, unfold="copy")
    apply_ailurus(vit, keep_ratio=0.5)
    assert vit.config.ailurus == {
        "grouping": "region_merging",
        "cluster_layer": 1,
        "keep_ratio": 0.5,
        "num_clusters": None,
        "num_neighbors": 1,
        "neighborhood_size": 8,
        "spatial_alpha": 0.9,
        "unfold": "copy",
        "tail_layers": 0,
        "places": None,
        "grouping_features": None,
    }


def test_a_ratio_replaces_a_count(vit):
    inputs = {"pixel_values": IMAGES}
    counted = outputs(apply_ailurus(vit, num_clusters=12), inputs)
    assert differ(outputs(apply_ailurus(vit, keep_ratio=0.5), inputs), counted)
    assert not differ(outputs(apply_ailurus(vit, keep_ratio=0.25), inputs), counted)
    set_keep_ratio(vit, 0.5)
    assert differ(outputs(vit, inputs), counted)


def test_settings_are_checked_at_the_next_forward(vit):
    apply_ailurus(vit)
    for name, value in {"keep_ratio": 0, "num_clusters": 0, "unfold": "other", "cluster_layer": 4}.items():
        before = dict(vit.config.ailurus)
        vit.config.ailurus[name] = value
        with pytest.raises(ValueError, match=name):
            vit(IMAGES)
        vit.config.ailurus = before
    vit.config.ailurus["keep_ratoi"] = 0.5
    with pytest.raises(ValueError, match="keep_ratoi"):
        vit(IMAGES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio.*above 0"),
        ({"num_clusters": 0}, "num_clusters.*at least 1"),
        ({"cluster_layer": 4}, "cluster_layer must leave a layer"),
        ({"cluster_layer": "2"}, "cluster_layer.*expected int"),
        ({"family": "vti"}, "family must be one of.*vit_msn.*FamilySpec"),
        ({"family": "deit"}, "no encoder of family 'deit'"),
        ({"family": FamilySpec("mine", ("ViTModel",), "blocks", ("embeddings",))}, "no module 'blocks'"),
        ({"family": FamilySpec("mine", ("Other",), "layers", ("embeddings",))}, "no module of class Other"),
    ],
)
def test_refusals_change_nothing(vit, settings, message):
    with pytest.raises(ValueError, match=message):
        apply_ailurus(vit, **settings)
    assert not controllers_of(vit)
    assert not hasattr(vit.config, "ailurus")
    assert vit.config._attn_implementation == "sdpa"


def test_a_family_of_another_type(vit):
    with pytest.raises(TypeError, match="name of a family or a FamilySpec, got list"):
        apply_ailurus(vit, family=["vit"])


def clip():
    torch.manual_seed(0)
    return CLIPModel(two_towers(CLIPConfig)).eval()


def features(model):
    with torch.no_grad():
        return {"": model.get_image_features(pixel_values=random_images(2, 64, 64)).pooler_output}


def test_settings_of_a_submodel_are_found_in_the_whole_model(tmp_path):
    model = clip()
    apply_ailurus(model.vision_model, cluster_layer=1, keep_ratio=0.25)
    expected = features(model)
    model.save_pretrained(tmp_path)
    loaded = apply_ailurus(CLIPModel.from_pretrained(tmp_path).eval())
    assert_equal(features(loaded), expected)
    assert loaded.config.ailurus["keep_ratio"] == 0.25
    apply_ailurus(model)
    assert_equal(features(model), expected)
    model.config.ailurus["keep_ratio"] = 0.5
    assert differ(features(model), expected)
    assert not hasattr(model.config.vision_config, "ailurus")
    apply_ailurus(model.vision_model, keep_ratio=0.25)  # the rest as in the whole model
    assert_equal(features(model), expected)


class Two(PreTrainedModel):
    """A model with two encoders."""

    config_class = ViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = (ViTModel(copy.deepcopy(config)) for _ in range(2))
        self.post_init()


@pytest.fixture
def two():
    return Two(ViTConfig(**TINY)).eval()


def test_encoders_that_keep_different_settings(two):
    apply_ailurus(two.first, keep_ratio=0.25)
    apply_ailurus(two.second, keep_ratio=0.5)
    before = outputs(two.first, INPUTS), outputs(two.second, INPUTS)
    with pytest.raises(ValueError, match=r"keep different settings.*remove_ailurus\(model\) first"):
        apply_ailurus(two)
    assert_equal(outputs(two.first, INPUTS), before[0])
    assert_equal(outputs(two.second, INPUTS), before[1])
    apply_ailurus(remove_ailurus(two), keep_ratio=0.25)
    assert_equal(outputs(two.first, INPUTS), before[0])


def test_removing_from_one_of_two_encoders(two):
    plain = outputs(two.first, INPUTS)
    apply_ailurus(two, keep_ratio=0.25)
    merged = outputs(two.second, INPUTS)
    remove_ailurus(two.first)
    assert_equal(outputs(two.first, INPUTS), plain)
    assert_equal(outputs(two.second, INPUTS), merged)
    two.config.ailurus["keep_ratio"] = 0.5
    assert differ(outputs(two.second, INPUTS), merged)


def test_two_models_with_one_configuration():
    config = ViTConfig(**TINY)
    first, second = ViTModel(config).eval(), ViTModel(config).eval()
    plain = outputs(first, INPUTS)
    apply_ailurus(first, keep_ratio=0.25)
    apply_ailurus(second, keep_ratio=0.25)
    merged = outputs(second, INPUTS)
    remove_ailurus(first)
    assert_equal(outputs(first, INPUTS), plain)
    assert_equal(outputs(second, INPUTS), merged)


def test_settings_may_change_between_forward_and_backward():
    """Layers on maps cluster again when gradient checkpointing runs them again: as in the forward."""
    model, inputs = SAM.adapted().double().train(), {"pixel_values": random_images(1, 64, 64).double()}
    expected = gradients(model, inputs)
    checkpoint_layers(model, use_reentrant=True)
    model.zero_grad()
    loss = sum(value.square().mean() for value in tensors(model(**inputs, output_hidden_states=True)).values())
    model.config.ailurus |= {"keep_ratio": 1.0, "unfold": "copy"}
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)
