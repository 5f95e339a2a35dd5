"""Adapted models among other tools: compilers whose graph breaks, other processes, PEFT."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters.controller import controllers_of
from ailurus_hf.modeling.reduction import Grouping, registered
from tests.adapters import test_more_encoders
from tests.adapters.test_apply import IMAGES, TINY, VIT
from tests.adapters.tester import Case, assert_close, assert_equal, differ, outputs, random_permutation
from tests.factories import random_images

INPUTS = {"pixel_values": IMAGES}


@pytest.mark.slow
def test_a_compiled_graph_may_break():
    """With more layers than torch compiles a function anew: the last ones run without compiling."""
    case = Case("vit", ViTModel, ViTConfig, {**TINY, "num_hidden_layers": 7})
    model, seen = case.adapted(tail_layers=2), []
    expected = outputs(model, INPUTS)
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().mean().item()))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        assert_close(outputs(compiled, INPUTS), expected)
    assert len(seen) == 1
    assert_equal(outputs(model, INPUTS), expected)


def test_a_saved_model_runs_in_another_process(tmp_path):
    model = VIT.model()
    model.set_attn_implementation("eager")
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.25)
    torch.save((model, IMAGES, model(IMAGES).last_hidden_state.detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from ailurus_hf import remove_ailurus; "
        "model, images, expected = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(model(images).last_hidden_state, expected); "
        "assert not torch.equal(remove_ailurus(model)(images).last_hidden_state, expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_copies_a_part_of_the_model():
    model = VIT.adapted()
    expected = outputs(model, INPUTS)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["patch_embeddings"])).eval()
    assert_close(outputs(tuned, INPUTS), expected)
    remove_ailurus(tuned.base_model.model)
    assert not controllers_of(tuned)
    assert_close(outputs(tuned, INPUTS), outputs(VIT.model(), INPUTS))


def test_masked_images_run_where_nothing_is_merged():
    """Masked images have no grid, and need none at keep_ratio=1."""
    model = ViTMAEModel(ViTMAEConfig(**{**TINY, "image_size": 64})).eval()
    inputs = {"pixel_values": random_images(2, 64, 64), "noise": torch.rand(2, 64)}
    plain = outputs(model, inputs)
    assert_equal(outputs(apply_ailurus(model, keep_ratio=1), inputs), plain)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("name", ["beit", "beit-backbone-shared", "data2vec", "data2vec-shared"])
def test_relative_bias_of_interpolated_positions(name, size):
    case = next(case for case in test_more_encoders.TestRelativeBias.cases if case.name == name)
    model, inputs = case.model(), {"pixel_values": random_images(2, *size), "interpolate_pos_encoding": True}
    if name == "beit-backbone-shared":
        model = model.beit
    plain = outputs(model, inputs)
    apply_ailurus(model, keep_ratio=1, cluster_layer=1)
    assert_equal(outputs(model, inputs), plain)
    apply_ailurus(model, keep_ratio=0.25)
    merged = outputs(model, inputs)
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in plain.items()}
    assert differ(merged, plain)
    with registered("permutation", Grouping(reduce=random_permutation)):
        assert_close(outputs(apply_ailurus(model, grouping="permutation"), inputs), plain)
