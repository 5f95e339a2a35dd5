"""What layers were like before transformers 5.23, imitated on the layers of today."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters import checkpointing
from ailurus_hf.adapters.arguments import INNER_SIZES
from ailurus_hf.adapters.controller import controllers_of
from tests.adapters.test_vit_like import SQUARE
from tests.adapters.tester import Case, assert_equal, checkpoint_layers, differ, gradients, images, outputs

CASE = Case("dinov2", Dinov2Model, Dinov2Config, SQUARE)
FUNCTION = "_gradient_checkpointing_func"


@pytest.fixture(params=["with arguments", "hidden states only"])
def todays_outputs(request, monkeypatch):
    """From here on DINOv2's layers are checkpointed with their hooks inside, and take no arguments, as in 5.17. The
    outputs are those of an adapted model from before."""
    expected = outputs(CASE.adapted(), images(2))
    layer_class = type(CASE.model().encoder.layer[0])
    forward = inspect.unwrap(layer_class.forward)

    def checkpoint_the_call(self, *args, **kwargs):
        call = partial(nn.Module.__call__.__get__(self), **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(call, *args)
        return call(*args)

    def hidden_states_only(self, hidden_states):
        return forward(self, hidden_states)

    def without_arguments(self, hidden_states, attention_mask=None, **kwargs):
        return checkpoint_the_call(self, hidden_states)

    takes_arguments = request.param == "with arguments"
    monkeypatch.setattr(layer_class, "forward", forward if takes_arguments else hidden_states_only)
    monkeypatch.setattr(
        layer_class, "__call__", checkpoint_the_call if takes_arguments else without_arguments, raising=False
    )
    monkeypatch.setattr(checkpointing, "_HOOKS_ARE_INSIDE", True)
    return expected


def test_sizes_reach_the_attention(todays_outputs):
    assert_equal(outputs(CASE.adapted(), images(2)), todays_outputs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_run_their_hooks_once(todays_outputs, use_reentrant):
    model, inputs = CASE.adapted().double().train(), {"pixel_values": images(2)["pixel_values"].double()}
    expected = gradients(model, inputs)
    checkpoint_layers(model, use_reentrant)
    calls = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    found = gradients(model, inputs)
    assert not INNER_SIZES._all()
    assert calls == [49, 13, 13, 13]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_checkpointing_is_put_back(todays_outputs):
    model = CASE.model().train()
    checkpoint_layers(model, use_reentrant=False)
    before = [vars(layer)[FUNCTION] for layer in model.encoder.layer]
    plain = gradients(model, images(2))
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.25)
    assert differ(gradients(model, images(2)), plain)
    assert all(
        vars(layer)[FUNCTION] is not function for layer, function in zip(model.encoder.layer, before, strict=True)
    )
    remove_ailurus(model)
    assert [vars(layer)[FUNCTION] for layer in model.encoder.layer] == before
    assert not controllers_of(model)
    assert_equal(gradients(model, images(2)), plain)
