import copy
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ailurus_hf import AiluRusSegformerBackbone, AiluRusSegformerForSemanticSegmentation, AiluRusSegformerModel
from ailurus_hf.modeling import reduction
from ailurus_hf.modeling.token_groups import group_tokens, merge_tokens, unfold_tokens
from tests.factories import random_images, tiny_segformer
from tests.modeling.test_modeling_ailurus import main_output
from tests.reference import merging as reference

ALL_CLASSES = [AiluRusSegformerModel, AiluRusSegformerBackbone, AiluRusSegformerForSemanticSegmentation]
ALL_STAGES = {"stage_keep_ratios": (0.5, 0.4, 0.3, 0.5)}
VARIANTS = {
    "default budget": {},
    "all stages": ALL_STAGES,
    "copy": {**ALL_STAGES, "unfold": "copy"},
    "tail": {"stage_keep_ratios": (1, 0.4, 0.3, 1), "tail_layers": 1},
    "cluster the embeddings": {**ALL_STAGES, "cluster_layer": 0},
    "conv head": {**ALL_STAGES, "decoder_type": "conv"},
    "three eps": {**ALL_STAGES, "patch_norm_eps": 1e-5, "reduction_norm_eps": 1e-4},
    "no reduction": {**ALL_STAGES, "sr_ratios": (1, 1, 1, 1)},
}


def images(batch_size: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return random_images(batch_size, height, width, seed)


def labels(*size: int) -> torch.Tensor:
    return torch.randint(0, 5, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


# ------------------------------------------------------------------------------------------------ the native class


def native_twin(model: AiluRusSegformerForSemanticSegmentation) -> SegformerForSemanticSegmentation:
    names = ("depths", "hidden_sizes", "num_attention_heads", "decoder_hidden_size", "num_labels", "sr_ratios")
    native = SegformerForSemanticSegmentation(SegformerConfig(**{n: getattr(model.config, n) for n in names})).eval()
    native.load_state_dict(model.state_dict())
    return native


@pytest.mark.parametrize("settings", [{"keep_ratio": 1}, {"stage_keep_ratios": (1, 1, 1, 1)}])
@pytest.mark.parametrize("size", [(64, 64), (29, 133), (50, 75)])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_all_ratios_one_is_the_native_segformer(size, batch_size, settings):
    """Feature maps bit for bit, except that a batch of one takes PyTorch's channels-last convolutions, which the native
    class misses; logits to rounding, since the head sums in another order."""
    model = tiny_segformer(
        AiluRusSegformerForSemanticSegmentation, layer_norm_eps=1e-5, upsample_logits=False, **settings
    )
    pixels = images(batch_size, *size)
    expected = native_twin(model)(pixels, output_hidden_states=True)
    output = model(pixels, output_hidden_states=True)
    for ours, native in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, native, rtol=0, atol=0 if batch_size > 1 else 1e-5)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    model.config.upsample_logits = True
    upsampled = F.interpolate(expected.logits, size=size, mode="bilinear")
    torch.testing.assert_close(model(pixels).logits, upsampled, rtol=0, atol=1e-5)


def test_the_loss_and_gradients_are_the_native_ones_grad():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, layer_norm_eps=1e-5, keep_ratio=1)
    native, truth = native_twin(model), labels(2, 64, 64)
    truth[:, :10] = 255
    expected, output = native(images(), labels=truth), model(images(), labels=truth)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), native.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def head_as_published(model: AiluRusSegformerForSemanticSegmentation, maps: list[torch.Tensor]) -> torch.Tensor:
    """Resize every projected stage to the first grid, concatenate, fuse."""
    head, resized = model.decode_head, []
    for feature_map, projection in zip(maps, head.linear_projections, strict=True):
        hidden = torch.einsum("oc,bchw->bohw", projection.proj.weight, feature_map)
        if model.config.decoder_type == "conv":
            hidden = F.relu(projection.batch_norm(hidden))
        else:
            hidden = hidden + projection.proj.bias[:, None, None]
        resized.append(F.interpolate(hidden, size=maps[0].shape[-2:], mode="bilinear", align_corners=False))
    if model.config.decoder_type == "linear":
        resized = resized[::-1]
    return head.classifier(F.relu(head.batch_norm(head.linear_fuse(torch.cat(resized, dim=1)))))


@pytest.mark.parametrize("decoder_type", ["linear", "conv"])
@pytest.mark.parametrize("training", [False, True])
def test_the_head_is_the_published_one(decoder_type, training):
    settings = {"decoder_type": decoder_type, "classifier_dropout_prob": 0.0}
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **settings).double()
    maps = list(model.segformer(images(2, 50, 75).double(), output_hidden_states=True).hidden_states)
    expected = head_as_published(copy.deepcopy(model).train(training), maps)
    torch.testing.assert_close(model.train(training).decode_head(maps), expected)


# ------------------------------------------------------------------------------------------------- merging is exact


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_many_clusters_as_tokens_is_bit_identical_to_keeping_all(model_class, variant):
    model = tiny_segformer(model_class, **VARIANTS[variant])
    merged = main_output(model(images()))
    model.config.num_clusters = 10**6
    output = model(images())
    assert all(torch.equal(a, torch.arange(a.shape[1]).expand(2, -1)) for a in output.assignment)
    assert all((sizes == 1).all() for sizes in output.group_sizes)
    model.config.keep_ratio, model.config.num_clusters = 1, None
    assert torch.equal(main_output(output), main_output(model(images())))
    assert "default" in variant or not torch.equal(merged, main_output(output))


def stage_with_copies(stage: int, implementation: str = "sdpa", **settings):
    """Blocks of a stage in float64, merged tokens, and groups that copy each token to places of a 4 x 6 grid."""
    model = tiny_segformer(AiluRusSegformerModel, sr_ratios=(4, 2, 2, 1), **settings).double()
    model.set_attn_implementation(implementation)
    assignment = torch.stack([torch.randperm(24) % 5, torch.randperm(24) ** 2 % 5 % 3])
    assignment[1, :5] = torch.arange(5)
    groups = group_tokens(assignment, 5)
    tokens = torch.randn(2, 5, model.config.hidden_sizes[stage], dtype=torch.float64)
    return model.stages[stage].blocks, tokens, groups


def on_grid(groups):
    """What blocks need to look at the grid in between."""
    return partial(merge_tokens, groups=groups), partial(unfold_tokens, groups=groups)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("unfold", ["copy", "residual"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_merging_equal_tokens_changes_nothing(stage, unfold, implementation):
    """Through whole blocks, where the depthwise convolution does not look around: elsewhere it tells equal tokens apart
    by their neighbours, and merging them must change something."""
    blocks, tokens, groups = stage_with_copies(stage, implementation)
    log_sizes = groups.sizes.double().log()
    dense = unfold_tokens(tokens, groups)
    residual = torch.zeros_like(dense) if unfold == "residual" else None
    for block in blocks:
        kernel = block.mlp.dwconv.dwconv.weight
        kernel.copy_(kernel[:, :, 1:2, 1:2] * torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
        tokens, _ = block(tokens, (4, 6), *on_grid(groups), log_sizes, residual)
        dense, _ = block(dense, (4, 6))
        tolerance = 1e-5 if implementation == "eager" else 1e-12  # eager's softmax is computed in float32
        torch.testing.assert_close(unfold_tokens(tokens, groups), dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_depthwise_convolution_is_averaged_over_each_cluster(stage):
    """With a linear activation the mean passes through the MLP: a block on merged tokens gives the means of the dense
    block on their copies."""
    blocks, tokens, groups = stage_with_copies(stage, hidden_act="linear")
    merged, _ = blocks[0](tokens, (4, 6), *on_grid(groups), groups.sizes.log())
    dense, _ = blocks[0](unfold_tokens(tokens, groups), (4, 6))
    torch.testing.assert_close(merged, merge_tokens(dense, groups))


def test_keys_and_values_see_the_unfolded_grid():
    """With a residual they are those of the dense block: only queries are merged."""
    blocks, tokens, groups = stage_with_copies(1)
    residual = torch.randn(2, 24, 32, dtype=torch.float64)
    seen = []
    blocks[0].attention.sequence_reduction.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    blocks[0](tokens, (4, 6), *on_grid(groups), groups.sizes.log(), residual)
    expected = blocks[0].layernorm_before(unfold_tokens(tokens, groups) + residual)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("variant", ["all stages", "copy", "conv head"])
def test_gradients_are_those_of_the_loop_version_grad(variant, monkeypatch):
    def gradients():
        model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **VARIANTS[variant]).double()
        model(images(2, 40, 56).double(), labels=labels(2, 40, 56)).loss.backward()
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
@pytest.mark.parametrize("size", [(29, 29), (31, 90), (64, 64)])
def test_any_image_size_and_every_variant(variant, size):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **VARIANTS[variant])
    output = model(images(2, *size), output_hidden_states=True)
    assert output.logits.shape == (2, 5, *size)
    assert output.logits.isfinite().all()
    grids = model.config.stage_grids(*size)
    for stage, (rows, columns) in enumerate(grids):
        assert output.hidden_states[stage].shape == (2, model.config.hidden_sizes[stage], rows, columns)
        assert output.assignment[stage].shape == (2, rows * columns)
        assert torch.equal(output.group_sizes[stage].sum(1), torch.full((2,), rows * columns))
        assert (output.group_sizes[stage] >= 1).all()
        assert output.assignment[stage].max() < output.group_sizes[stage].shape[1]


def test_budgets_are_per_stage():
    model = tiny_segformer(AiluRusSegformerModel, stage_keep_ratios=(0.25, 1, 0.5, 0.3))
    assert [sizes.shape[1] for sizes in model(images()).group_sizes] == [64, 64, 8, 1]
    model.config.num_clusters = 7
    assert [sizes.shape[1] for sizes in model(images()).group_sizes] == [7, 64, 7, 4]
    model.config.num_clusters, model.config.stage_keep_ratios, model.config.keep_ratio = None, None, 0.75
    assert [sizes.shape[1] for sizes in model(images()).group_sizes] == [256, 64, 12, 3]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_batch_equals_single_images(implementation):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **ALL_STAGES)
    model.set_attn_implementation(implementation)
    pixels = images(3, 50, 75)
    batch = model(pixels)
    for index in range(3):
        single = model(pixels[index : index + 1])
        for one, all_of_them in zip(single.assignment, batch.assignment, strict=True):
            assert torch.equal(one[0], all_of_them[index])
        torch.testing.assert_close(single.logits[0], batch.logits[index], rtol=1e-4, atol=2e-5)


def test_a_block_less_unfolds_all_the_same():
    model = tiny_segformer(AiluRusSegformerModel, **ALL_STAGES)
    shape = model(images()).last_hidden_state.shape
    del model.stages[1].blocks[-1]
    assert model(images()).last_hidden_state.shape == shape


def test_two_runs_give_the_same_bits():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **ALL_STAGES)
    assert torch.equal(model(images()).logits, model(images()).logits)


@pytest.mark.parametrize(
    ("implementation", "variant"),
    [
        ("sdpa", "all stages"),
        ("sdpa", "no reduction"),
        pytest.param("flex_attention", "all stages", marks=pytest.mark.slow),
    ],
)
def test_attention_implementations_agree(implementation, variant):
    settings = {**VARIANTS[variant], "hidden_sizes": (16, 32, 64, 64), "num_attention_heads": (1, 2, 4, 4)}
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **settings)
    model.set_attn_implementation("eager")
    expected = model(images()).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_ratio", [1, 0.5])
def test_half_precision(dtype, keep_ratio):
    """Rounding moves some tokens to another cluster, so that single pixels differ: the bulk must agree."""
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, keep_ratio=keep_ratio)
    expected = model(images()).logits
    logits = copy.deepcopy(model).to(dtype)(images()).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().median() < 0.05 * expected.std()


def test_autocast_runs_and_stays_close():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **ALL_STAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images()).logits
    expected = model(images()).logits
    assert (logits.float() - expected).abs().median() < 0.2 * expected.std()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_pixels_neither_hang_nor_fail(bad):
    pixels = images()
    pixels[0, :, 5, 5] = bad
    output = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **ALL_STAGES)(pixels)
    assert output.logits[1].isfinite().all()
    for assignment, sizes in zip(output.assignment, output.group_sizes, strict=True):
        assert assignment.max() < sizes.shape[1]


def test_copies_are_equal_where_the_residual_tells_tokens_apart():
    model = tiny_segformer(AiluRusSegformerModel, stage_keep_ratios=(1, 1, 1, 0.5), unfold="copy")
    output = model(images(2, 128, 128))
    tokens = output.last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.equal(tokens, tokens.gather(1, first_members(output.assignment[3])[..., None].expand_as(tokens)))
    model.config.unfold = "residual"
    tokens = model(images(2, 128, 128)).last_hidden_state.flatten(2).transpose(1, 2)
    assert len(tokens[0].unique(dim=0)) == 16


def first_members(assignment: torch.Tensor) -> torch.Tensor:
    same = assignment[:, :, None] == assignment[:, None, :]
    return same.int().argmax(2)


# --------------------------------------------------------------------------------------------------- outputs on request


def test_attentions_have_merged_queries_and_reduced_keys():
    model = tiny_segformer(AiluRusSegformerModel, stage_keep_ratios=(1, 0.5, 1, 0.5))
    model.set_attn_implementation("eager")
    shapes = [tuple(w.shape) for w in model(images(), output_attentions=True).attentions]
    dense, half = [(2, 1, 256, 4)] * 2 + [(2, 2, 64, 4)], [(2, 2, 32, 4)] * 2
    assert shapes == [*dense, *half, *[(2, 3, 16, 4)] * 3, (2, 4, 4, 4), (2, 4, 2, 2)]
    assert model(images()).attentions is None
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"output_attentions=True needs attn_implementation='eager', got 'sdpa'"):
        model(images(), output_attentions=True)


def test_selected_hidden_states():
    model = tiny_segformer(AiluRusSegformerModel)
    everything = model(images(), output_hidden_states=True)
    assert torch.equal(everything.hidden_states[-1], everything.last_hidden_state)
    for request, present in ((2, {2}), ([0, -1], {0, 3}), ([7], set())):
        some = model(images(), output_hidden_states=request).hidden_states
        assert {index for index, states in enumerate(some or ()) if states is not None} == present
    assert model(images()).hidden_states is None


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_return_dict_false_gives_the_same_values_as_a_tuple(model_class):
    model = tiny_segformer(model_class)
    named, plain = model(images(), output_hidden_states=True), model(images(), return_dict=False)
    assert isinstance(plain, tuple)
    torch.testing.assert_close(plain[0], named.to_tuple()[0])


def test_backbone_maps_are_the_hidden_states_of_the_model():
    backbone = tiny_segformer(AiluRusSegformerBackbone, out_features=["stage1", "stage3", "stage4"])
    model = AiluRusSegformerModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict())
    states = model(images(2, 50, 75), output_hidden_states=True).hidden_states
    output = backbone(images(2, 50, 75))
    assert backbone.channels == [16, 48, 64]
    assert output.hidden_states is None
    for feature_map, index in zip(output.feature_maps, (0, 2, 3), strict=True):
        assert torch.equal(feature_map, states[index])


def test_logits_at_a_quarter_on_request():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation)
    full = model(images(2, 50, 75), labels=labels(2, 50, 75))
    model.config.upsample_logits = False
    quarter = model(images(2, 50, 75), labels=labels(2, 50, 75))
    assert quarter.logits.shape == (2, 5, 13, 19)
    assert torch.equal(F.interpolate(quarter.logits, size=(50, 75), mode="bilinear"), full.logits)
    assert torch.equal(quarter.loss, full.loss)


# ------------------------------------------------------------------------------------------------- training and systems


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_grad(reentrant):
    def gradients(checkpointing):
        settings = {**ALL_STAGES, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
        model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **settings).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model(images().requires_grad_(), labels=labels(2, 64, 64)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("decoder_type", ["linear", "conv"])
def test_every_parameter_gets_a_gradient_grad(decoder_type):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, decoder_type=decoder_type, **ALL_STAGES).train()
    model(images(), labels=labels(2, 64, 64)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_stochastic_depth_acts_in_training_only():
    model = tiny_segformer(AiluRusSegformerModel, drop_path_rate=0.9)
    assert torch.equal(model(images()).last_hidden_state, model(images()).last_hidden_state)
    model.train()
    assert not torch.equal(model(images()).last_hidden_state, model(images()).last_hidden_state)


@pytest.mark.slow  # that it can be traced is tested by the export below
@pytest.mark.parametrize("variant", ["tail", "all stages", "conv head"])
def test_compiles_into_one_graph_for_every_batch_size(variant):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **VARIANTS[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch_size in (1, 2, 3):
        pixels = images(batch_size, 40, 56)
        expected, output = model(pixels), compiled(pixels)
        assert all(torch.equal(*pair) for pair in zip(output.assignment, expected.assignment, strict=True))
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_compiles_with_hidden_states_and_gradients_grad():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(images(), labels=labels(2, 64, 64)).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = compiled(images(), labels=labels(2, 64, 64), output_hidden_states=True)
    output.loss.backward()
    assert output.hidden_states[3].shape == (2, 64, 2, 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_exports_with_a_dynamic_batch():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, **ALL_STAGES)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (images(2),), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    torch.testing.assert_close(program.module()(images(5)).logits, model(images(5)).logits, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64), "pixel_values must be (batch_size, num_channels, height, width), got shape (3, 64)"),
        ((1, 4, 64, 64), "pixel_values must have num_channels=3 channels, got 4"),
        ((1, 3, 28, 64), "pixel_values must be at least 29 x 29 pixels, so that every stage has a whole square"),
    ],
)
@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_refuses_wrong_pixel_values(model_class, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_segformer(model_class)(torch.zeros(shape))


def test_refuses_labels_of_another_size():
    message = re.escape("labels must be (batch_size, height, width) = (2, 64, 64), got (2, 16, 16)")
    with pytest.raises(ValueError, match=message):
        tiny_segformer(AiluRusSegformerForSemanticSegmentation)(images(), labels=labels(2, 16, 16))


def test_refuses_a_cluster_layer_set_too_late():
    model = tiny_segformer(AiluRusSegformerModel)
    model.config.cluster_layer = 2
    with pytest.raises(ValueError, match=r"cluster_layer must leave a block .* in stage 4: .* at most 1, got 2"):
        model(images())
