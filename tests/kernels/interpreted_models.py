"""Whole models with kernels and without."""

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ailurus_hf import AiluRusModel, AiluRusSegformerModel, save_with_code
from ailurus_hf.modeling import grouping_region_merging
from tests.factories import random_images, tiny_model, tiny_segformer
from tests.kernels.cases import kernels


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(grouping_region_merging, "NUM_ROUNDS", 2)


@pytest.fixture(params=["density_peaks", "region_merging"])
def model(request):
    return tiny_model(AiluRusModel, keep_ratio=0.25, grouping=request.param)


def test_same_outputs_and_gradients(model):
    images, outputs, gradients = random_images(), [], []

    def forward_and_backward():
        output = model(images)
        model.zero_grad()
        output.last_hidden_state.square().mean().backward()
        outputs.append(output)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])

    forward_and_backward()
    with kernels() as launched:
        forward_and_backward()
    assert {"_groups_kernel", "_merge_kernel", "_unfold_kernel"} <= set(launched)
    assert torch.equal(outputs[0].assignment, outputs[1].assignment)
    torch.testing.assert_close(outputs[1].last_hidden_state, outputs[0].last_hidden_state)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_autocast_groups_as_the_plain_operations(model):
    images = random_images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(images)
        with kernels():
            found = model(images)
    assert torch.equal(found.assignment, expected.assignment)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_one_graph():
    model, images = tiny_model(AiluRusModel, keep_ratio=0.25, grouping="density_peaks"), random_images()
    with kernels() as launched:
        expected = model(images).last_hidden_state
        once = len(launched)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images).last_hidden_state, expected)
        assert len(launched) == 2 * once


@torch.no_grad()
def test_hierarchical_models():
    model = tiny_segformer(AiluRusSegformerModel, keep_ratio=0.25, grouping="density_peaks")
    images = random_images(1, 32, 32)
    expected = model(images).last_hidden_state
    with kernels() as launched:
        torch.testing.assert_close(model(images).last_hidden_state, expected)
    assert "_unfold_kernel" in launched


@torch.no_grad()
def test_code_that_a_checkpoint_brings_stays_plain(tmp_path):
    model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping="density_peaks")
    expected = model(random_images()).last_hidden_state
    save_with_code(model, tmp_path / "with_code")
    with kernels() as launched:
        reference = "modeling_ailurus.AiluRusModel"
        remote = get_class_from_dynamic_module(reference, tmp_path / "with_code").from_pretrained(
            tmp_path / "with_code"
        )
        assert type(remote).__module__.startswith("transformers_modules")
        assert torch.equal(remote(random_images()).last_hidden_state, expected)
    assert launched == []
