import copy
import re
import threading

import pytest
import torch
from transformers import ViTConfig, ViTModel

from ailurus_hf import (
    AiluRusBackbone,
    AiluRusConfig,
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusModel,
    restore,
)
from ailurus_hf.modeling import reduction
from ailurus_hf.modeling.layers_ailurus import AiluRusDropPath
from tests.factories import random_images, slow, tiny_config, tiny_model
from tests.reference import merging as reference

ALL_CLASSES = [AiluRusModel, AiluRusBackbone, AiluRusForSemanticSegmentation, AiluRusForImageClassification]
VARIANTS = {
    "plain": {},
    "no class token": {"use_cls_token": False},
    "distilled": {"use_distillation_token": True},
    # 4: sequences of 40 tokens would meet an error of torch 2.13, whose flex attention is wrong for heads of 8 and some
    # multiples of 8 tokens on processors without AVX-512.
    "registers": {"num_register_tokens": 4},
    "registers with positions": {"num_register_tokens": 3, "num_prefix_positions": 4},
    "patch positions only": {"num_prefix_positions": 0},
    "layer scale": {"layerscale_value": 0.5},
    "swiglu": {"use_swiglu_ffn": True},
    "no qkv bias": {"qkv_bias": False},
    "no patch bias": {"patch_bias": False},
    "qk norm": {"use_qk_norm": True},
    "pooler norm": {"use_pooler_norm": True, "pooling": "cls_mean"},
    "no final norm": {"use_final_norm": False},
    "copy": {"unfold": "copy"},
    "tail": {"tail_layers": 1},
    "cluster the embeddings": {"cluster_layer": 0},
    "mask transformer": {"decoder_type": "mask_transformer"},
    "progressive upsampling": {"decoder_type": "progressive_upsampling", "decoder_hidden_size": 12},
}


def main_output(output) -> torch.Tensor:
    for name in ("logits", "feature_maps", "last_hidden_state"):
        if name in output:
            return output[name][0] if name == "feature_maps" else output[name]
    raise AssertionError(f"no main output among {list(output)}")


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


# ------------------------------------------------------------------ against the native class and the loop reference


def native_twin(model: AiluRusModel) -> ViTModel:
    config = model.config
    native = ViTModel(
        ViTConfig(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers, patch_size=config.patch_size,
            num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
            image_size=config.image_size, layer_norm_eps=config.layer_norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    native.load_state_dict(model.state_dict())
    return native


@pytest.mark.parametrize("size", [(48, 48), (64, 40)])
def test_keep_ratio_one_is_the_native_vit_bit_for_bit(size):
    model = tiny_model(AiluRusModel, keep_ratio=1)
    images = random_images(2, *size)
    expected = native_twin(model)(images, interpolate_pos_encoding=True, output_hidden_states=True)
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    for ours, native in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, native)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_clusters_as_tokens_is_bit_identical_to_keeping_all(model_class, variant):
    model, images = tiny_model(model_class, keep_ratio=1, **VARIANTS[variant]), random_images()
    expected = main_output(model(images))
    model.config.keep_ratio, model.config.num_clusters = 0.5, 10**6
    output = model(images)
    assert torch.equal(main_output(output), expected)
    assert torch.equal(output.assignment, torch.arange(36).expand(2, -1))
    assert (output.group_sizes == 1).all()
    model.config.num_clusters = None
    assert not torch.equal(main_output(model(images)), expected)


@pytest.mark.parametrize("variant", ["plain", "registers", "copy", "tail", "no class token"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", *slow("flex_attention")])
def test_merging_equal_tokens_changes_nothing(variant, implementation):
    """Sizes weigh the attention exactly: an image of 5 flat regions needs only 5 tokens."""
    settings = {"cluster_layer": 0, "num_clusters": 5, "neighborhood_size": 150}  # every token sees all others
    model = tiny_model(AiluRusModel, **{**VARIANTS[variant], **settings})
    model.set_attn_implementation(implementation)
    patches = model.config.num_position_rows_before_patches
    model.embeddings.position_embeddings[:, patches:] = 0
    regions = torch.tensor([[0] * 12 + [1] * 9 + [2] * 3 + [3] * 11 + [4]]).view(1, 1, 6, 6)
    images = regions.repeat_interleave(8, 2).repeat_interleave(8, 3).float().expand(2, 3, -1, -1) - 2
    merged = model(images)
    assert merged.group_sizes.sort().values.tolist() == [[1, 3, 9, 11, 12]] * 2
    model.config.num_clusters = 36
    torch.testing.assert_close(merged.last_hidden_state, model(images).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unfold", ["copy", "residual"])
def test_gradients_are_those_of_the_loop_version_grad(unfold, monkeypatch):
    def gradients():
        model = tiny_model(AiluRusForSemanticSegmentation, unfold=unfold, keep_ratio=0.3).double()
        labels = torch.randint(0, 5, (2, 48, 48), generator=torch.Generator().manual_seed(0))
        model(random_images().double(), labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    fast = gradients()
    monkeypatch.setattr(
        reduction, "merge_tokens", lambda x, groups: reference.merge(x, groups.assignment, groups.sizes.shape[1])
    )
    monkeypatch.setattr(reduction, "unfold_tokens", lambda x, groups: reference.unfold(x, groups.assignment))
    slow = gradients()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], msg=name)


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (30, 61), (48, 48)])
def test_any_image_size_and_every_variant(variant, size):
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3, **VARIANTS[variant])
    output = model(random_images(2, *size), output_hidden_states=True)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert output.logits.shape == (2, 5, *size)
    assert output.assignment.shape == (2, rows * columns)
    assert torch.equal(output.group_sizes.sum(1), torch.full((2,), rows * columns))
    assert len(output.hidden_states) == 5
    tokens = rows * columns + model.config.num_prefix_tokens
    assert all(states.shape == (2, tokens, 32) for states in output.hidden_states)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_batch_equals_single_images(implementation):
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3)
    model.set_attn_implementation(implementation)
    images = random_images(3, 40, 56)
    batch = model(images)
    for index in range(3):
        single = model(images[index : index + 1])
        assert torch.equal(single.assignment[0], batch.assignment[index])
        torch.testing.assert_close(single.logits[0], batch.logits[index], rtol=1e-5, atol=1e-5)


def test_two_runs_give_the_same_bits():
    model, images = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3), random_images()
    assert torch.equal(model(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("implementation", "variant"),
    [("sdpa", "plain"), ("sdpa", "registers"), ("sdpa", "mask transformer"), ("flex_attention", "registers")],
)
def test_attention_implementations_agree(implementation, variant):
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3, **VARIANTS[variant])
    model.set_attn_implementation("eager")
    expected = model(random_images()).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(random_images()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("keep_ratio", [1, 0.3])
def test_half_precision(dtype, tolerance, keep_ratio):
    """Compared on the same clusters, since rounding may move a token between two equally good ones."""
    model, images = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=keep_ratio, cluster_layer=0), random_images()
    expected = model(images)
    output = copy.deepcopy(model).to(dtype)(images)
    assert output.logits.dtype == dtype
    same = (output.assignment == expected.assignment).float().mean()
    assert same > 0.85
    difference = (output.logits.float() - expected.logits).abs()
    assert difference.median() < tolerance


def test_autocast_runs_and_stays_close():
    model, images = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.5), random_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images).logits
    assert (logits.float() - model(images).logits).abs().median() < 0.1


def test_a_layer_less_unfolds_all_the_same():
    model, images = tiny_model(AiluRusModel, keep_ratio=0.3), random_images()
    shape = model(images).last_hidden_state.shape
    del model.layers[-1]
    assert model(images).last_hidden_state.shape == shape


def test_merged_tokens_inside_a_layer_are_restored():
    model, seen = tiny_model(AiluRusModel, keep_ratio=0.3, unfold="copy", use_final_norm=False), []
    model.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    output = model(random_images())
    assert seen[0].shape[1] < output.last_hidden_state.shape[1]
    assert torch.equal(restore(seen[0], output), output.last_hidden_state)
    with pytest.raises(ValueError, match="at least"):
        restore(seen[0][:, :2], output)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_pixels_neither_hang_nor_fail(bad):
    images = random_images()
    images[0, :, 5, 5] = bad
    output = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3)(images)
    assert output.logits[1].isfinite().all()
    assert output.assignment.max() < output.group_sizes.shape[1]


def test_residual_unfolding_returns_what_told_tokens_apart():
    """Tokens of one cluster get the same output from "copy", different ones from "residual"."""
    model, images = tiny_model(AiluRusModel, keep_ratio=0.2, unfold="copy"), random_images(1)
    copied = model(images, output_hidden_states=True)
    model.config.unfold = "residual"
    residual = model(images, output_hidden_states=True)
    cluster = copied.group_sizes[0].argmax()
    members = (copied.assignment[0] == cluster).nonzero()[:, 0] + 1
    for states in copied.hidden_states[2:]:
        assert (states[0, members] == states[0, members[0]]).all()
    before = copied.hidden_states[1][0, members]
    expected = copied.hidden_states[4][0, members] + before - before.mean(0)
    torch.testing.assert_close(residual.hidden_states[4][0, members], expected)


def test_tail_layers_run_on_the_full_grid():
    model = tiny_model(AiluRusModel, keep_ratio=0.3, tail_layers=1, attn_implementation="eager")
    model.set_attn_implementation("eager")
    lengths = [weights.shape[-1] for weights in model(random_images(), output_attentions=True).attentions]
    assert lengths == [37, 12, 12, 37]


# --------------------------------------------------------------------------------------------------- outputs on request


def test_attentions_stay_on_merged_tokens():
    model = tiny_model(AiluRusModel, num_clusters=10)
    model.set_attn_implementation("eager")
    attentions = model(random_images(), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 37, 37)] + [(2, 4, 11, 11)] * 3
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_attentions_need_eager():
    with pytest.raises(ValueError, match=r"output_attentions=True needs attn_implementation='eager', got 'sdpa'"):
        tiny_model(AiluRusModel)(random_images(), output_attentions=True)


def test_selected_hidden_states():
    model = tiny_model(AiluRusModel, keep_ratio=0.3)
    everything = model(random_images(), output_hidden_states=True).hidden_states
    for request, present in ((3, {3}), ([1, -1], {1, 4}), ([0], {0}), (-2, {3})):
        some = model(random_images(), output_hidden_states=request).hidden_states
        assert {index for index, states in enumerate(some) if states is not None} == present
        for index in present:
            assert torch.equal(some[index], everything[index])
    assert model(random_images()).hidden_states is None


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_return_dict_false_gives_the_same_values_as_a_tuple(model_class):
    model = tiny_model(model_class, keep_ratio=0.3)
    named = model(random_images(), output_hidden_states=True)
    plain = model(random_images(), output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named.to_tuple())
    torch.testing.assert_close(plain[0], named.to_tuple()[0])


@pytest.mark.parametrize("reshape", [True, False])
def test_backbone_maps_are_full_grids_of_the_models_hidden_states(reshape):
    settings = {"keep_ratio": 0.3, "num_register_tokens": 2, "out_features": ["stem", "stage2", "stage3", "stage4"]}
    backbone = tiny_model(AiluRusBackbone, reshape_hidden_states=reshape, apply_layernorm=False, **settings)
    model = AiluRusModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict())
    states = model(random_images(2, 40, 61), output_hidden_states=True).hidden_states
    output = backbone(random_images(2, 40, 61))
    assert output.hidden_states is None
    assert backbone.channels == [32] * 4
    for feature_map, index in zip(output.feature_maps, (0, 2, 3, 4), strict=True):
        expected = states[index]
        if reshape:
            expected = expected[:, 3:].transpose(1, 2).reshape(2, 32, 5, 8)
        assert torch.equal(feature_map, expected)


# ------------------------------------------------------------------------------------------------- training and systems


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_grad(reentrant):
    settings = {"decoder_type": "mask_transformer", "decoder_dropout_prob": 0.0}

    def gradients(checkpointing):
        model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3, **settings).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        images = random_images().requires_grad_()
        model(images, labels=torch.zeros(2, 48, 48, dtype=torch.int64)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("head", ["mask transformer", "progressive upsampling"])
def test_every_parameter_gets_a_gradient_grad(head):
    settings = {**VARIANTS[head], "num_register_tokens": 2, "layerscale_value": 0.1}
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3, **settings)
    model(random_images(), labels=torch.zeros(2, 48, 48, dtype=torch.int64)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_loss_leaves_out_the_ignored_label():
    model = tiny_model(AiluRusForSemanticSegmentation, semantic_loss_ignore_index=77)
    labels = torch.randint(0, 5, (2, 48, 48))
    labels[:, :20] = 77
    output = model(random_images(), labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :, 20:], labels[:, 20:])
    torch.testing.assert_close(output.loss, expected)


def test_classification_pools_and_has_a_loss():
    model = tiny_model(AiluRusForImageClassification, pooling="mean")
    output = model(random_images(), labels=torch.tensor([1, 4]))
    pooled = model.ailurus(random_images()).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(output.logits, model.classifier(pooled))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 4])))


def test_class_token_and_mean_side_by_side():
    model = tiny_model(AiluRusForImageClassification, pooling="cls_mean", num_register_tokens=2, keep_ratio=1)
    states = model.ailurus(random_images()).last_hidden_state
    pooled = torch.cat([states[:, 0], states[:, 3:].mean(1)], dim=-1)
    assert torch.equal(model.ailurus(random_images()).pooler_output, pooled)
    assert torch.equal(model(random_images()).logits, model.classifier(pooled))


def test_a_norm_may_follow_the_pooling():
    model = tiny_model(AiluRusModel, pooling="mean", use_pooler_norm=True, use_final_norm=False, layer_norm_eps=1e-3)
    output, norm = model(random_images()), model.pooler_norm
    mean = output.last_hidden_state[:, 1:].mean(1)
    expected = torch.nn.functional.layer_norm(mean, (32,), norm.weight, norm.bias, eps=1e-3)
    torch.testing.assert_close(output.pooler_output, expected)


def test_the_distillation_tokens_classifier_has_half_the_say():
    model = tiny_model(
        AiluRusForImageClassification, use_distillation_token=True, use_distillation_classifier=True, keep_ratio=1
    )
    states = model.ailurus(random_images()).last_hidden_state
    expected = (model.classifier(states[:, 0]) + model.distillation_classifier(states[:, 1])) / 2
    assert torch.equal(model(random_images()).logits, expected)


def test_queries_and_keys_are_normalised_in_each_head():
    """The norm's scale of a query cannot change with its input's: doubling the projections changes nothing."""
    model = tiny_model(AiluRusModel, use_qk_norm=True, keep_ratio=1, layer_norm_eps=0.0)
    expected = model(random_images()).last_hidden_state
    for layer in model.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj):
            projection.weight.mul_(2)
            projection.bias.mul_(2)
    torch.testing.assert_close(model(random_images()).last_hidden_state, expected)
    assert model.layers[0].attention.q_norm.weight.shape == (8,)


def test_logits_squeezed_to_the_image():
    """An image of 5.6 x 6.3 patches; one of whole patches is resized the same in both ways."""
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=1)
    images = random_images(1, 45, 50)
    states = model.ailurus(images).last_hidden_state[:, 1:]
    maps = model.decode_head(states, (6, 7))
    model.config.logits_resize = "squeeze"
    expected = torch.nn.functional.interpolate(maps, size=(45, 50), mode="bilinear")
    assert torch.equal(model(images).logits, expected)
    model.config.logits_resize = "crop"
    assert not torch.allclose(model(images).logits, expected, atol=1e-3)
    whole = random_images(1, 40, 48)
    cropped = model(whole).logits
    model.config.logits_resize = "squeeze"
    assert torch.equal(model(whole).logits, cropped)


@pytest.mark.parametrize(
    ("num_layers", "kernel_size", "upscale"), [(1, 1, 4), (4, 3, 2), (2, 5, 3), (1, 3, 1)], ids=str
)
def test_progressive_upsampling_against_its_formulas(num_layers, kernel_size, upscale):
    """On a grid of 5 x 7; the first two are SETR's naive and PUP heads."""
    settings = {"decoder_num_layers": num_layers, "decoder_kernel_size": kernel_size, "decoder_upscale": upscale}
    model = tiny_model(
        AiluRusForSemanticSegmentation, keep_ratio=1, logits_resize="squeeze", decoder_layer_norm_eps=1e-2,
        decoder_type="progressive_upsampling", decoder_hidden_size=12, **settings,
    )  # fmt: skip
    head, images = model.decode_head, random_images(2, 37, 50)
    for batch_norm in head.batch_norms:
        batch_norm.running_mean.uniform_(-1, 1)
        batch_norm.running_var.uniform_(0.5, 2)
    tokens = model.ailurus(images).last_hidden_state[:, 1:]
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-2).sqrt()
    maps = (tokens * head.layernorm.weight + head.layernorm.bias).view(2, 5, 7, 32).permute(0, 3, 1, 2)
    for convolution, norm in zip(head.convolutions, head.batch_norms, strict=True):
        reach = kernel_size // 2
        windows = torch.nn.functional.pad(maps, (reach,) * 4).unfold(2, kernel_size, 1).unfold(3, kernel_size, 1)
        maps = torch.einsum("bcyxij,ocij->boyx", windows, convolution.weight)
        mean, deviation = norm.running_mean.view(-1, 1, 1), (norm.running_var + 1e-5).sqrt().view(-1, 1, 1)
        maps = (maps - mean) / deviation * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        maps = torch.nn.functional.interpolate(maps.clamp(min=0), scale_factor=float(upscale), mode="bilinear")
    maps = torch.einsum("bcyx,oc->boyx", maps, head.classifier.weight[:, :, 0, 0]) + head.classifier.bias.view(-1, 1, 1)
    assert maps.shape == (2, 5, 5 * upscale**num_layers, 7 * upscale**num_layers)
    expected = torch.nn.functional.interpolate(maps, size=(37, 50), mode="bilinear")
    torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_acts_in_training_only():
    model, images = tiny_model(AiluRusModel, drop_path_rate=0.9), random_images(8)
    assert torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)
    model.train()
    assert not torch.equal(model(images).last_hidden_state, model(images).last_hidden_state)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    drop, branch = AiluRusDropPath(0.75).train(), torch.ones(4000, 3, 2)
    dropped = drop(branch)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(drop.eval()(branch), branch)


@pytest.mark.parametrize("variant", ["plain", *slow("tail", "mask transformer", "progressive upsampling")])
def test_compiles_into_one_graph_for_every_batch_size(variant):
    torch.compiler.reset()  # the limit of compilations counts those of earlier tests
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.2, **VARIANTS[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch_size in (1, 2, 3):
        images = random_images(batch_size, 40, 56)
        expected, output = model(images), compiled(images)
        assert torch.equal(output.assignment, expected.assignment)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_compiles_with_hidden_states_and_gradients_grad():
    torch.compiler.reset()
    model, images = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3), random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.zeros(2, 48, 48, dtype=torch.int64)
    model(images, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = compiled(images, labels=labels, output_hidden_states=True)
    output.loss.backward()
    assert output.hidden_states[3].shape == (2, 37, 32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    model, images = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3), random_images()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(images).logits, model(images).logits, rtol=1e-4, atol=1e-5
    )


def test_exports_with_a_dynamic_batch():
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (random_images(2),), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    images = random_images(5)
    torch.testing.assert_close(program.module()(images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


def test_settings_changed_later_hold_from_the_next_forward():
    model = tiny_model(AiluRusModel)
    for ratio, count in ((0.5, 18), (0.25, 9), (1, 36)):
        model.config.keep_ratio = ratio
        assert model(random_images()).group_sizes.shape == (2, count)


def test_deepcopy_and_threads_are_independent():
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3)
    twin = copy.deepcopy(model)
    twin.config.keep_ratio = 1
    images = [random_images(seed=seed) for seed in range(4)]
    expected = [model(image).logits for image in images]
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = model(images[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert model(images[0]).group_sizes.shape[1] == 11
    assert twin(images[0]).group_sizes.shape[1] == 36
    for index in range(4):
        torch.testing.assert_close(found[index], expected[index])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 48), "pixel_values must be (batch_size, num_channels, height, width), got shape (3, 48)"),
        ((1, 1, 3, 48, 48), "got shape (1, 1, 3, 48, 48)"),
        ((1, 4, 48, 48), "pixel_values must have num_channels=3 channels, got 4"),
        ((1, 3, 7, 48), "pixel_values must be at least one patch of 8 x 8 pixels, got height and width (7, 48)"),
    ],
)
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_refuses_wrong_pixel_values(model_class, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model(model_class)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 48, 48), (2, 5, 48, 48)])
def test_refuses_labels_of_another_size(shape):
    message = re.escape(f"labels must be (batch_size, height, width) = (2, 48, 48), got {shape}")
    with pytest.raises(ValueError, match=message):
        tiny_model(AiluRusForSemanticSegmentation)(random_images(), labels=torch.zeros(shape, dtype=torch.int64))


def test_refuses_a_cluster_layer_set_too_late():
    model = tiny_model(AiluRusModel)
    model.config.cluster_layer = 4
    message = r"cluster_layer must leave a layer .* num_hidden_layers=4 .* at most 3, got 4"
    with pytest.raises(ValueError, match=message):
        model(random_images())


def test_factory_config_is_small():
    assert isinstance(tiny_config(), AiluRusConfig)
    assert sum(parameter.numel() for parameter in tiny_model(AiluRusModel).parameters()) < 60_000
