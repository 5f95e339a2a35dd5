"""The adapter against slower, more obvious versions of itself, its settings, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AttentionInterface,
    BertConfig,
    BertModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PoolFormerConfig,
    PoolFormerModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ailurus_hf import AiluRusConfig, AiluRusModel, apply_ailurus, remove_ailurus, supported_families
from ailurus_hf.adapters import FamilySpec, probe
from ailurus_hf.adapters.controller import controllers_of
from ailurus_hf.adapters.families import FAMILIES
from ailurus_hf.modeling.grouping_density_peaks import cluster_tokens
from tests.adapters import test_maps, test_more_encoders, test_vit_like  # noqa: F401  every family's cases
from tests.adapters.tester import Case, FamilyTests, assert_close, assert_equal, differ, outputs
from tests.factories import random_images

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 8,
    "image_size": (48, 64),
}
VIT = Case("vit", ViTModel, ViTConfig, {**TINY, "initializer_range": 0.2})
DINOV3 = Case("dinov3", DINOv3ViTModel, DINOv3ViTConfig, {**TINY, "image_size": 64, "num_register_tokens": 2})
IMAGES = random_images(2, 48, 64)


@pytest.fixture
def vit():
    return VIT.model()


@pytest.mark.parametrize("unfold", ["copy", "residual"])
@pytest.mark.parametrize("case", [VIT, DINOV3], ids=["vit", "dinov3"])
@pytest.mark.parametrize(("cluster_layer", "tail_layers"), [(0, 0), (1, 0), (2, 1), (3, 0)])
def test_merging_equals_running_on_duplicated_tokens(case, cluster_layer, tail_layers, unfold):
    """Give every token its cluster's mean and its representative's position; run the plain layers on all of them."""
    model = case.model()
    num_prefix = 1 if case is VIT else 3
    with torch.no_grad():
        hidden = model.embeddings(IMAGES)
        cos, sin = (None, None) if case is VIT else model.rope_embeddings(IMAGES)
        for index, layer in enumerate(model.layers if case is VIT else model.model.layer):
            if index == cluster_layer:
                tokens = hidden[:, num_prefix:]
                assignment, representatives = cluster_tokens(tokens, (6, 8), 12)
                members = F.one_hot(assignment, 12).float()
                means = (members.mT @ tokens) / members.sum(1)[..., None]
                duplicated = members @ means
                residual = tokens - duplicated if unfold == "residual" else 0
                hidden = torch.cat([hidden[:, :num_prefix], duplicated], dim=1)
                if cos is not None:
                    position = representatives.gather(1, assignment)
                    dense = cos, sin
                    cos, sin = cos[position][:, None], sin[position][:, None]
            if index == 4 - tail_layers:
                hidden = torch.cat([hidden[:, :num_prefix], hidden[:, num_prefix:] + residual], dim=1)
                cos, sin = (None, None) if cos is None else dense
            hidden = layer(hidden) if case is VIT else layer(hidden, position_embeddings=(cos, sin))
        if not tail_layers:
            hidden = torch.cat([hidden[:, :num_prefix], hidden[:, num_prefix:] + residual], dim=1)
        expected = model.layernorm(hidden) if case is VIT else model.norm(hidden)
        settings = {"num_clusters": 12, "unfold": unfold, "tail_layers": tail_layers}
        apply_ailurus(model, cluster_layer, grouping="density_peaks", **settings)
        actual = model(IMAGES).last_hidden_state
    assert_close({"": actual}, {"": expected})


def test_hidden_states_of_dense_layers_are_the_plain_models(vit):
    plain = outputs(vit, {"pixel_values": IMAGES})
    merged = outputs(apply_ailurus(vit, cluster_layer=2), {"pixel_values": IMAGES})
    for index in range(3):
        assert torch.equal(merged[f".hidden_states.{index}"], plain[f".hidden_states.{index}"])
    first = outputs(apply_ailurus(vit, cluster_layer=0), {"pixel_values": IMAGES})
    assert torch.equal(first[".hidden_states.0"], plain[".hidden_states.0"])


def test_hooks_from_before_see_the_full_grid(vit):
    seen = {}
    vit.register_forward_hook(lambda module, args, output: seen.update(states=output.hidden_states))
    vit.layers[3].register_forward_hook(lambda module, args, output: seen.update(last=output))
    apply_ailurus(vit, cluster_layer=1)
    states = vit(IMAGES, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(seen["states"], states, strict=True))
    assert [state.shape[1] for state in [*seen["states"], seen["last"]]] == [49] * 6


def test_selected_hidden_states_and_tuples(vit):
    apply_ailurus(vit, cluster_layer=1)
    every = vit(IMAGES, output_hidden_states=True).hidden_states
    some = vit(IMAGES, output_hidden_states=[2]).hidden_states
    assert some[3] is None
    assert torch.equal(some[2], every[2])
    assert torch.equal(vit(IMAGES, output_hidden_states=True, return_dict=False)[-1][2], every[2])


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "fake_flash"])
def test_every_kind_of_attention(implementation):
    """Flash kernels take no mask: `fake_flash` is one that would fail on a mask, and computes as SDPA does."""

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("fake_flash", flash)
    expected = outputs(VIT.adapted(), {"pixel_values": IMAGES})
    model = VIT.adapted()
    model.config._attn_implementation = implementation  # after adapting: seen by the next forward
    assert_close(outputs(model, {"pixel_values": IMAGES}), expected)
    remove_ailurus(model)
    assert model.config._attn_implementation == implementation


def test_two_adapted_models_in_one(vit):
    class Pair(ViTModel):
        def __init__(self, config):
            super().__init__(config)
            self.second = ViTModel(config)

        def forward(self, pixel_values):
            first = self.embeddings(pixel_values)  # both are under way at once
            second = self.second(pixel_values).last_hidden_state
            for layer in self.layers:
                first = layer(first)
            return first, second

    pair = Pair(ViTConfig(**TINY)).eval()
    apply_ailurus(pair, keep_ratio=0.25)
    assert len(controllers_of(pair)) == 2
    alone = apply_ailurus(ViTModel(ViTConfig(**TINY)).eval(), keep_ratio=0.25)
    alone.load_state_dict(pair.second.state_dict())
    assert torch.equal(pair(IMAGES)[1], alone(IMAGES).last_hidden_state)
    assert pair(IMAGES)[0].shape == (2, 49, 32)
    remove_ailurus(pair)
    assert not controllers_of(pair)


def test_shuffled_tokens_are_clustered_on_their_grid():
    """ViTMAE's embeddings shuffle the patches; its answer must not depend on how, once put back in order."""
    config = ViTMAEConfig(**{**TINY, "image_size": 64, "mask_ratio": 0.0})
    model = apply_ailurus(ViTMAEModel(config).eval(), cluster_layer=0, keep_ratio=0.25)
    images, ordered = random_images(2, 64, 64), torch.arange(64.0).expand(2, -1)
    expected = model(images, noise=ordered).last_hidden_state[:, 1:]
    shuffled = model(images, noise=torch.rand(2, 64))
    index = shuffled.ids_restore[..., None].expand(-1, -1, 32)
    assert_close({"": shuffled.last_hidden_state[:, 1:].gather(1, index)}, {"": expected})


def test_removing_leaves_what_is_not_of_transformers_alone(vit):
    vit.extra = torch.nn.Linear(2, 2)
    vit.extra.config, vit.extra.ailurus = {"a": 1}, "mine"
    remove_ailurus(apply_ailurus(vit))
    assert (vit.extra.config, vit.extra.ailurus) == ({"a": 1}, "mine")
    assert not hasattr(vit.config, "ailurus")


def test_removing_from_nothing():
    with pytest.raises(TypeError, match="model must be a torch module, got NoneType"):
        remove_ailurus(None)


def test_an_attention_that_cannot_learn_sizes():
    siglip = SiglipVisionModel(SiglipVisionConfig(**{**TINY, "image_size": 64}))
    siglip.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"additive mask.*'sdpa' or 'eager', got 'flash_attention_2'"):
        apply_ailurus(siglip)
    assert not controllers_of(siglip)
    assert not hasattr(siglip.config, "ailurus")


def test_models_that_cannot_be_adapted():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ValueError, match="BertModel has no vision encoder"):
        apply_ailurus(BertModel(BertConfig(**sizes)))
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=32))
    with pytest.raises(ValueError, match=r"SwinModel is not supported: it runs in shifted windows.*dinov2"):
        apply_ailurus(swin)
    unknown = PoolFormerModel(PoolFormerConfig(depths=[1], hidden_sizes=[8], num_encoder_blocks=1))
    with pytest.raises(ValueError, match=r"PoolFormerModel holds no encoder of a known family \(.*dinov2.*probe"):
        apply_ailurus(unknown)
    with pytest.raises(TypeError, match="Linear has none"):
        apply_ailurus(torch.nn.Linear(2, 2))
    assert remove_ailurus(swin) is swin


def test_inputs_without_a_grid(vit):
    apply_ailurus(vit, cluster_layer=1)
    with pytest.raises(RuntimeError, match="without its patch embedding"):
        vit.layers[1](torch.zeros(2, 49, 32))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        vit(IMAGES, attention_mask=F.pad(torch.ones(2, 40), (0, 9)))
    with pytest.raises(ValueError, match=r"at least one patch of \(8, 8\) pixels, got \(4, 64\)"):
        vit(IMAGES[:, :, :4], interpolate_pos_encoding=True)
    masked = apply_ailurus(ViTMAEModel(ViTMAEConfig(**{**TINY, "image_size": 64})))
    with pytest.raises(ValueError, match="a subset of the patches"):
        masked(random_images(2, 64, 64))


def test_attention_weights_are_refused_where_tokens_are_merged(vit):
    vit.set_attn_implementation("eager")
    apply_ailurus(vit)
    with pytest.raises(ValueError, match="output_attentions"):
        vit(IMAGES, output_attentions=True)
    vit.config.ailurus["keep_ratio"] = 1
    assert len(vit(IMAGES, output_attentions=True).attentions) == 4


def test_a_wrong_number_of_tokens_is_noticed(vit):
    apply_ailurus(vit, cluster_layer=1)
    vit.layers[3].register_forward_hook(lambda module, args, output: output[:, 1:], prepend=True)
    with pytest.raises(RuntimeError, match="expected 25 merged tokens to unfold, got 24"):
        vit(IMAGES)


def test_supported_families():
    """In alphabetical order; each runs the shared tests."""
    families = supported_families()
    assert families == tuple(sorted(spec.family for spec in FAMILIES))
    cases = [case for tests in FamilyTests.__subclasses__() for case in tests.cases]
    tested = {controller.spec.family for case in cases for controller in controllers_of(case.adapted())}
    assert tested == set(families)


def test_probe_finds_the_row_of_an_unknown_encoder(vit, capsys, monkeypatch):
    found = probe(vit, IMAGES)
    row = next(spec for spec in FAMILIES if spec.family == "vit")
    assert (found.owners, found.layers, found.patches, found.taps) == (row.owners, row.layers, row.patches, row.taps)
    printed = capsys.readouterr().out.strip()
    assert eval(printed, {"FamilySpec": FamilySpec}) == found
    assert not controllers_of(vit)
    assert vit.config._attn_implementation == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr("ailurus_hf.adapters.apply.FAMILIES", ())
        with pytest.raises(ValueError, match="no encoder of a known family"):
            apply_ailurus(vit)
        apply_ailurus(vit, keep_ratio=0.25, cluster_layer=1, family=found)
    adapted = outputs(vit, {"pixel_values": IMAGES})
    assert_equal(adapted, outputs(VIT.adapted(), {"pixel_values": IMAGES}))


def test_probe_finds_rows_that_the_table_lacks():
    model = Aimv2VisionModel(Aimv2VisionConfig(**{**TINY, "image_size": 64})).eval()
    inputs = {"pixel_values": random_images(2, 64, 64)}
    plain = outputs(model, inputs)
    with pytest.raises(ValueError, match="no encoder of a known family"):
        apply_ailurus(model)
    apply_ailurus(model, 1, 0.25, family=probe(model, **inputs))
    merged = outputs(model, inputs)
    assert {name: value.shape for name, value in merged.items()} == {n: value.shape for n, value in plain.items()}
    assert differ(merged, plain)


@pytest.mark.parametrize("family", ["siglip", "dinov3_vit"])
def test_probe_finds_masks_and_rotary_positions(family):
    settings = {**TINY, "image_size": 64}
    model = {
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**settings)),
        "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**settings, num_register_tokens=2)),
    }[family]()
    found = probe(model.eval(), random_images(2, 64, 64))
    row = next(spec for spec in FAMILIES if spec.family == family)
    assert (found.layers, found.taps, found.bias, found.positions) == (row.layers, row.taps, row.bias, row.positions)


def test_probe_wants_the_same_outputs_from_tokens_in_another_order(vit):
    """Layers that add positions by the place in the sequence: every shape is right, and the outputs are not."""
    layer_class = type(vit.layers[0])

    class WithPositions(layer_class):
        def forward(self, hidden_states, *args, **kwargs):
            places = torch.arange(hidden_states.shape[1])[:, None] / 10
            return super().forward(hidden_states + places, *args, **kwargs)

    for layer in vit.layers:
        layer.__class__ = WithPositions
    with pytest.raises(ValueError, match="no row fits ViTModel"):
        probe(vit, IMAGES)


def test_probe_says_when_nothing_fits(vit):
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[3], num_heads=[2], image_size=32, patch_size=4, window_size=4))
    with pytest.raises(ValueError, match="no row fits SwinModel"):
        probe(swin, random_images(1, 32, 32))
    with pytest.raises(ValueError, match="must not be adapted"):
        probe(apply_ailurus(vit), IMAGES)


@pytest.mark.parametrize("keep_ratio", [1, 0.25])
def test_an_adapted_vit_is_this_packages_own_model(keep_ratio):
    """The same weights in `AiluRusModel`: two implementations around the same clustering."""
    native = VIT.model()
    settings = {"keep_ratio": keep_ratio, "cluster_layer": 1, "tail_layers": 1}
    own = AiluRusModel(AiluRusConfig(**TINY, **settings, layer_norm_eps=native.config.layer_norm_eps)).eval()
    result = own.load_state_dict(native.state_dict(), strict=False)
    assert not result.missing_keys
    assert all(name.startswith("pooler") for name in result.unexpected_keys)
    actual = outputs(apply_ailurus(native, **settings), {"pixel_values": IMAGES})
    expected = outputs(own, {"pixel_values": IMAGES})
    assert_equal(
        *({name: value for name, value in found.items() if "hidden_state" in name} for found in (actual, expected))
    )
