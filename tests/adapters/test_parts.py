"""Encoders whose layers are changed after adapting, that run in parts, and whose insides others look at."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SamVisionConfig, SamVisionModel, ViTConfig, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus, restore
from ailurus_hf.adapters.families import FAMILIES
from tests.adapters.test_apply import IMAGES, TINY, VIT
from tests.adapters.tester import assert_close, assert_equal, outputs
from tests.factories import random_images

INPUTS = {"pixel_values": IMAGES}
SQUARE = {"pixel_values": random_images(2, 64, 64)}
CHANGES = {
    "last": lambda layers: layers.__delitem__(-1),
    "inside": lambda layers: layers.__delitem__(2),
    "first": lambda layers: layers.__delitem__(0),
    "one more": lambda layers: layers.append(copy.deepcopy(layers[0])),
    "another": lambda layers: layers.__setitem__(3, copy.deepcopy(layers[1])),
}


def clip():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**{**TINY, "image_size": 64, "initializer_factor": 10.0}))
    return model.eval(), model.encoder.layers, SQUARE


def vit():
    model = VIT.model()
    return model, model.layers, INPUTS


def sam():
    torch.manual_seed(0)
    sizes = {**TINY, "image_size": 64, "window_size": 3, "global_attn_indexes": [0, 1, 2, 3, 4], "output_channels": 8}
    model = SamVisionModel(SamVisionConfig(**sizes)).eval()
    return model, model.vision_encoder.layers, SQUARE


# ------------------------------------------------------------------------------------------------- layers that change


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", [vit, clip, sam])
@torch.no_grad()
def test_layers_changed_after_adapting(make, change):
    (model, layers, inputs), (other, other_layers, _) = make(), make()
    plain = outputs(model, inputs)
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.25)
    outputs(model, inputs)
    for changed in (layers, other_layers):
        change(changed)
    expected = outputs(apply_ailurus(other, cluster_layer=1, keep_ratio=0.25), inputs)
    found = outputs(model, inputs)
    assert_equal(found, expected)
    assert found[".last_hidden_state"].shape == plain[".last_hidden_state"].shape
    remove_ailurus(model)
    assert_equal(outputs(model, inputs), outputs(remove_ailurus(other), inputs))


@torch.no_grad()
def test_a_wrapped_layer_keeps_its_hooks():
    class Wrapper(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, *args, **kwargs):
            return self.wrapped(*args, **kwargs)

    model = VIT.adapted()
    expected = outputs(model, INPUTS)
    for index, layer in enumerate(model.layers):
        model.layers[index] = Wrapper(layer)
    assert_equal(outputs(model, INPUTS), expected)


@torch.no_grad()
def test_layers_change_after_another_model_of_the_configuration_was_put_back():
    model = VIT.adapted()
    other = apply_ailurus(ViTModel(model.config).eval(), cluster_layer=1, keep_ratio=0.25)
    expected = model(IMAGES).last_hidden_state
    remove_ailurus(other)
    assert torch.equal(model(IMAGES).last_hidden_state, expected)
    del model.layers[-1]
    assert model(IMAGES).last_hidden_state.shape == expected.shape


def test_too_few_layers_are_left():
    model = apply_ailurus(VIT.model(), cluster_layer=3)
    del model.layers[-1]
    with pytest.raises(ValueError, match="cluster_layer must leave a layer"):
        model(IMAGES)


def test_a_stretch_that_does_not_end():
    class Short(ViTModel):
        def forward(self, pixel_values):
            hidden = self.embeddings(pixel_values)
            for layer in self.layers[:-1]:
                hidden = layer(hidden)
            return {"last_hidden_state": self.layernorm(hidden)}

    short = apply_ailurus(Short(ViTConfig(**TINY)).eval(), keep_ratio=0.25)
    with pytest.raises(RuntimeError, match=r"Short ended with its tokens merged: layer 3.*raise tail_layers"):
        short(IMAGES)
    short.config.ailurus["tail_layers"] = 1
    assert short(IMAGES)["last_hidden_state"].shape == (2, 49, 32)


# ------------------------------------------------------------------------------------------------------------- parts


def in_parts(model, embeddings, seen=None):
    hidden = embeddings
    for layer in model.layers:
        hidden = layer(hidden)
        if seen is not None:
            seen.append(hidden)
    return model.layernorm(hidden)


def embed(model, height, width, seed=0):
    images = random_images(2, height, width, seed=seed)
    whole = model(images, interpolate_pos_encoding=True).last_hidden_state
    return model.embeddings(images, interpolate_pos_encoding=True), whole


@torch.no_grad()
def test_stored_embeddings_where_nothing_is_merged():
    plain, adapted = VIT.model(), VIT.model()
    apply_ailurus(adapted, keep_ratio=1)
    stored = [model.embeddings(IMAGES) for model in (plain, adapted)]
    for _ in range(2):
        assert torch.equal(in_parts(adapted, stored[1]), in_parts(plain, stored[0]))
    model, _, inputs = clip()
    expected = model(**inputs).last_hidden_state
    apply_ailurus(model, keep_ratio=1)
    stored = model.pre_layrnorm(model.embeddings(inputs["pixel_values"]))
    for _ in range(2):
        assert torch.equal(model.encoder(inputs_embeds=stored).last_hidden_state, expected)


@torch.no_grad()
def test_stored_embeddings_keep_their_grid():
    """All of them have 48 patches: the number of tokens does not tell the grids apart."""
    square = ViTModel(ViTConfig(**{**TINY, "image_size": 64, "initializer_range": 0.2})).eval()
    model = apply_ailurus(square, cluster_layer=1, keep_ratio=0.25)
    stored = [embed(model, height, width) for height, width in ((48, 64), (64, 48), (32, 96))]
    for embeddings, whole in [*stored, *reversed(stored)]:
        assert torch.equal(in_parts(model, embeddings), whole)


@torch.no_grad()
def test_changed_embeddings_have_the_grid_that_all_have():
    model, _, inputs = clip()
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.25)
    expected = model(**inputs).last_hidden_state
    stored = model.pre_layrnorm(model.embeddings(inputs["pixel_values"]))
    for _ in range(2):
        assert torch.equal(model.encoder(inputs_embeds=stored).last_hidden_state, expected)
    model.embeddings(random_images(2, 48, 96), interpolate_pos_encoding=True)
    with pytest.raises(RuntimeError, match="embeddings whose grid is not known"):
        model.encoder(inputs_embeds=stored)
    assert torch.equal(model(**inputs).last_hidden_state, expected)


# ---------------------------------------------------------------------------------------------------------- watchers


@pytest.mark.parametrize("unfold", ["copy", "residual"])
def test_hooks_see_the_full_grid_and_change_nothing(unfold):
    def run(model):
        model.zero_grad()
        output = model(**inputs, output_hidden_states=True)
        output.last_hidden_state.square().mean().backward()
        return outputs(model, inputs), {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    inputs = {"pixel_values": IMAGES.double()}  # some gradients are sums that cancel
    model = apply_ailurus(VIT.model().double(), cluster_layer=1, keep_ratio=0.25, unfold=unfold)
    expected, gradients = run(model)
    seen, seen_gradients = {}, {}

    def look(index, module, args, output):
        seen[index] = output
        output.register_hook(partial(seen_gradients.__setitem__, index))

    handles = [layer.register_forward_hook(partial(look, index)) for index, layer in enumerate(model.layers)]
    model(**inputs, output_hidden_states=True).last_hidden_state.square().mean().backward()
    assert [seen[index].shape for index in range(4)] == [(2, 49, 32)] * 4
    assert all(gradient.shape == (2, 49, 32) and gradient.abs().sum() > 0 for gradient in seen_gradients.values())
    for index in range(4):
        assert torch.equal(seen[index], expected[f".hidden_states.{index + 1}"])
    seen_gradients.clear()
    with torch.no_grad():
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(lambda module, args, output, index=index: seen.update({index: output}))
    found, found_gradients = run(model)
    assert_equal(found, expected)
    assert_close(found_gradients, gradients)


@torch.no_grad()
def test_what_a_hook_changes_goes_on():
    """Twice the full grid is twice the merged tokens, whichever of the two a hook doubles."""
    doubled = VIT.adapted(unfold="copy")
    doubled.layers[2].register_forward_hook(lambda module, args, output: output * 2)
    inside = VIT.adapted(unfold="copy")
    inside.layers[2].register_forward_hook(lambda module, args, output: output * 2, prepend=True)
    assert_close(outputs(doubled, INPUTS), outputs(inside, INPUTS), 1e-5)
    in_place = VIT.adapted(unfold="copy")
    in_place.layers[2].register_forward_hook(lambda module, args, output: [output.mul_(2)][1:] or None)
    assert_close({"": in_place(IMAGES).last_hidden_state}, {"": doubled(IMAGES).last_hidden_state}, 1e-5)


@torch.no_grad()
def test_loops_over_the_layers_see_the_full_grid():
    model = apply_ailurus(VIT.model(), cluster_layer=1, keep_ratio=0.25)
    states = model(IMAGES, output_hidden_states=True).hidden_states
    seen = []
    in_parts(model, model.embeddings(IMAGES), seen)
    assert all(torch.equal(*pair) for pair in zip(seen, states[1:], strict=True))


@torch.no_grad()
def test_merged_tokens_inside_a_layer_are_restored():
    model, seen = VIT.adapted(), []
    model.layers[2].mlp.register_forward_hook(
        lambda module, args, output: seen.extend([output, restore(output, model)])
    )
    model(IMAGES)
    merged, full = seen
    assert (merged.shape, full.shape) == ((2, 13, 32), (2, 49, 32))
    assert {tuple(row.tolist()) for row in full[0]} == {tuple(row.tolist()) for row in merged[0]}
    with pytest.raises(ValueError, match="no forward"):
        restore(merged, model)


def test_parts_that_run_alone_keep_no_model_alive():
    model = apply_ailurus(vit()[0])
    model.embeddings(**INPUTS)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


class WithMaps(ViTModel):
    """Hands out maps beside its hidden states, square ones."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["maps"] = (torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 16, 16))
        return output


@torch.no_grad()
def test_square_maps_are_no_attention_weights():
    row = replace(next(row for row in FAMILIES if row.family == "vit"), owners=("WithMaps",))
    torch.manual_seed(0)
    model = WithMaps(ViTConfig(**{**TINY, "image_size": 64}, attn_implementation="eager")).eval()
    apply_ailurus(model, family=row, keep_ratio=0.5)
    assert [part.shape[-1] for part in model(**SQUARE).maps] == [8, 16]
    with pytest.raises(ValueError, match="output_attentions=True is not possible where tokens are merged"):
        model(**SQUARE, output_attentions=True)
