"""Layer-wise learning rates, and budgets that change during training."""

import pytest
import torch
from transformers import TrainerControl, TrainerState

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusSegformerForSemanticSegmentation
from ailurus_hf.training import KeepRatioSchedule, freeze_layers, layerwise_parameter_groups
from tests.factories import random_images, tiny_model, tiny_segformer


def rates(model, **settings):
    """Learning rate and weight decay of every parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layerwise_parameter_groups(model, 1.0, 0.1, **settings)
    listed = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(listed) == len({name for name, _, _ in listed})
    return {name: (rate, decay) for name, rate, decay in listed}


def test_layers_near_the_input_learn_more_slowly():
    model = tiny_model(AiluRusForSemanticSegmentation, num_register_tokens=2, use_final_norm=True)
    found = rates(model, layer_decay=0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (rate, _) in found.items():
        if ".layers." in name and name.startswith("ailurus."):
            assert rate == 0.5 ** (4 - int(name.split(".layers.")[1].split(".")[0])), name
        elif name.startswith("ailurus.embeddings."):
            assert rate == 0.5**5, name
        else:
            assert rate == 1, name
    assert {name for name, (rate, _) in found.items() if rate == 1} == {
        "ailurus.layernorm.weight", "ailurus.layernorm.bias", "decode_head.classifier.weight",
        "decode_head.classifier.bias",
    }  # fmt: skip


def test_only_matrices_and_kernels_decay():
    found = rates(tiny_model(AiluRusForSemanticSegmentation, num_register_tokens=2, decoder_type="mask_transformer"))
    for name, (rate, decay) in found.items():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decay == (0.1 if is_matrix else 0.0), name
        assert rate == 1


def test_hierarchical_encoders_count_their_blocks_through_the_stages():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation)
    found = rates(model, layer_decay=0.9)
    assert found.keys() == dict(model.named_parameters()).keys()
    by_rate = sorted({rate for rate, _ in found.values()})
    assert by_rate[0] == pytest.approx(0.9**11)
    assert by_rate[-1] == 1
    assert all(rate == 1 for name, (rate, _) in found.items() if name.startswith("decode_head"))


def test_frozen_parameters_are_left_out_and_wrong_decays_refused():
    model = tiny_model(AiluRusForSemanticSegmentation)
    model.ailurus.requires_grad_(False)
    assert all(name.startswith("decode_head") for name in rates(model))
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got 0"):
        layerwise_parameter_groups(model, 1.0, layer_decay=0)


def test_frozen_layers_get_no_gradient_and_the_others_the_same():
    pixels = random_images()
    plain, frozen = (tiny_model(AiluRusForSemanticSegmentation) for _ in range(2))
    freeze_layers(frozen, 2)
    for model in (plain, frozen):
        model(pixels).logits.square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        if name.startswith(("ailurus.embeddings.", "ailurus.layers.0.", "ailurus.layers.1.")):
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name].grad), name
    freeze_layers(plain, 0)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    with pytest.raises(ValueError, match="count must be from 0 to the number of layers 4, got 5"):
        freeze_layers(plain, 5)


def test_a_schedule_follows_the_steps():
    model = tiny_model(AiluRusForSemanticSegmentation)
    schedule = KeepRatioSchedule.parse("0:1,0.5:0.25")
    found = []
    for step in range(4):
        state = TrainerState(global_step=step, max_steps=4)
        schedule.on_step_begin(None, state, TrainerControl(), model=model)
        found.append(model.config.keep_ratio)
    assert found == [1, 1, 0.25, 0.25]


@pytest.mark.parametrize("text", ["", "0.5", "0.1:0.5", "0:1,0.5:0.25,0.5:1", "0:1,1:0.5", "0:0", "0:1:2", "half"])
def test_senseless_schedules_are_refused(text):
    with pytest.raises(ValueError, match="a schedule is START:RATIO"):
        KeepRatioSchedule.parse(text)
