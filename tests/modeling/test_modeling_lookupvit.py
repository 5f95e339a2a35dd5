"""LookupViT's models; every test whose name has "grad" computes gradients."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import ailurus_hf
from ailurus_hf import (
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusModel,
    LookupViTBackbone,
    LookupViTConfig,
    LookupViTForImageClassification,
    LookupViTForSemanticSegmentation,
    LookupViTForVideoClassification,
    LookupViTModel,
    with_budget,
)
from ailurus_hf.demo.scenes import draw_scene
from ailurus_hf.modeling.layers_lookupvit import LookupViTBlock
from tests.factories import random_images, random_videos, slow, tiny_lookupvit, tiny_lookupvit_config, tiny_model
from tests.reference import lookupvit as reference

IMAGE_CLASSES = [
    LookupViTModel,
    LookupViTBackbone,
    LookupViTForSemanticSegmentation,
    LookupViTForImageClassification,
]
VIDEO = {"num_frames": 4, "tubelet_size": 2}


def main_output(output) -> torch.Tensor:
    for name in ("logits", "feature_maps", "last_hidden_state"):
        if name in output:
            return output[name][0] if name == "feature_maps" else output[name]
    raise AssertionError(f"no main output among {list(output)}")


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.node.name):
        yield


# -------------------------------------------------------------------------------------------- the block by its formulas


REUSE = st.sampled_from(["weights", "logits"])


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.booleans(), REUSE, st.integers(0, 99))
def test_block_against_the_loop_version_grad(num_compressed, num_lookup, num_heads, qkv_bias, reuse, seed):
    settings = {"num_attention_heads": num_heads, "qkv_bias": qkv_bias, "attn_implementation": "sdpa"}
    settings["attention_reuse"] = reuse
    config = tiny_lookupvit_config(hidden_size=8, **settings)
    with torch.enable_grad():
        torch.manual_seed(seed)
        layer = LookupViTBlock(config).double().eval()
        tokens = [torch.randn(2, count, 8, dtype=torch.float64) for count in (num_compressed, num_lookup)]
        mixture = [torch.randn_like(stream) for stream in tokens]

        def gradients(outputs, inputs):
            loss = sum((weights * output).sum() for weights, output in zip(mixture, outputs, strict=True))
            return torch.autograd.grad(loss, [*inputs, *layer.parameters()])

        inputs = [stream.clone().requires_grad_() for stream in tokens]
        compressed, lookup, weights = layer(*inputs)
        assert weights is None
        found = gradients((compressed, lookup), inputs)
        inputs = [stream.clone().requires_grad_() for stream in tokens]
        images = [reference.block(layer, *image) for image in zip(*inputs, strict=True)]
        expected = [torch.stack(stream) for stream in zip(*images, strict=True)]
        torch.testing.assert_close([compressed, lookup], expected)
        torch.testing.assert_close(list(found), list(gradients(expected, inputs)))


class Products(TorchDispatchMode):
    """Counts matrix products by the sizes of their result."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.counts[tuple(result.shape[-2:])] += 1
        return result


@pytest.mark.parametrize("reuse", ["weights", "logits"])
def test_the_logits_are_computed_once_in_a_block(reuse):
    """6 compressed and 11 lookup tokens; one head of 32: results of M x N are the logits, of N x M none."""
    config = tiny_lookupvit_config(num_attention_heads=1, attn_implementation="eager", attention_reuse=reuse)
    layer = LookupViTBlock(config).eval()
    with Products() as products:
        layer(torch.randn(1, 6, 32), torch.randn(1, 11, 32))
    assert products.counts == {
        (6, 11): 1,  # the logits, for both directions
        (6, 32): 10,  # gather: q, o, average; refine: q, k, v, o, average, second layer of the MLP; infuse: v
        (6, 6): 1,  # the compressed tokens' own logits
        (6, 64): 1,  # first layer of their MLP
        (11, 32): 5,  # k, v; infuse: o and average; second layer of the light MLP
        (11, 16): 1,  # its first layer
    }


def flops_of_blocks(config, num_lookup, num_compressed) -> int:
    """The formulas, in multiply-adds."""
    n, m, d = num_lookup, num_compressed, config.hidden_size
    gather = 2 * m * d**2 + 2 * n * d**2 + 2 * m * n * d
    refine = 4 * m * d**2 + 2 * m**2 * d + 2 * config.mlp_ratio * m * d**2
    infuse = m * d**2 + n * d**2 + m * n * d
    return config.num_hidden_layers * (gather + refine + infuse + int(2 * n * d**2 / config.lookup_mlp_divisor))


@pytest.mark.parametrize("size", [3, 5, (7, 4), 10])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_measured_operations_are_the_formulas(size, implementation):
    config = LookupViTConfig(num_hidden_layers=2, compressed_size=size, attn_implementation=implementation)
    with torch.device("meta"):
        model = LookupViTModel(config).eval()
    with FlopCounterMode(display=False) as counter:
        output = model(torch.empty(1, 3, 224, 224, device="meta"))
    embedding = 196 * 768 * 3 * 16**2
    expected = 2 * (embedding + flops_of_blocks(config, 196, output.compressed_hidden_state.shape[1]))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_streams_start_from_resized_tokens():
    """On a trained grid of 6 x 6 in 4 x 5 compressed tokens, which have positions for 5 x 5."""
    model = tiny_lookupvit(LookupViTModel)
    parts, images = model.embeddings, random_images()
    patches = parts.patch_embeddings.projection(images) + parts.position_embeddings.mT.view(1, 32, 6, 6)
    table = parts.compressed_position_embeddings.mT.view(1, 32, 5, 5)
    expected = F.interpolate(patches, size=(4, 5), mode="bilinear") + F.interpolate(table, (4, 5), mode="bilinear")
    compressed, lookup = parts(parts.patch_embeddings(images), (4, 5))
    torch.testing.assert_close(lookup, patches.flatten(2).mT)
    torch.testing.assert_close(compressed, expected.flatten(2).mT)


# ---------------------------------------------------------------------------------------------------- sizes and budgets


@pytest.mark.parametrize("model_class", IMAGE_CLASSES)
@pytest.mark.parametrize("size", [(8, 16), (30, 61), (48, 48), (100, 72)])
def test_any_image_size(model_class, size):
    output = main_output(tiny_lookupvit(model_class)(random_images(2, *size), compressed_size=(1, 2)))
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    shapes = {
        LookupViTModel: (2, rows * columns, 32),
        LookupViTBackbone: (2, 32, rows, columns),
        LookupViTForSemanticSegmentation: (2, 5, *size),
        LookupViTForImageClassification: (2, 5),
    }
    assert output.shape == shapes[model_class]
    assert output.isfinite().all()


@given(st.integers(8, 64), st.integers(8, 64), st.data())
def test_one_model_serves_every_compressed_size(height, width, data):
    model = tiny_lookupvit(LookupViTModel)
    grid = model.config.patch_grid(height, width)
    size = tuple(data.draw(st.integers(1, side)) for side in grid)
    output = model(random_images(1, height, width), compressed_size=size)
    assert output.compressed_hidden_state.shape == (1, size[0] * size[1], 32)
    assert output.last_hidden_state.shape == (1, grid[0] * grid[1], 32)
    assert output.last_hidden_state.isfinite().all()


def test_budgets_for_a_call_in_a_block_and_from_now_on():
    model, images = tiny_lookupvit(LookupViTModel), random_images()

    def count(**call):
        return model(images, **call).compressed_hidden_state.shape[1]

    assert count() == 9
    assert count(compressed_size=5) == 25
    with with_budget(model, compressed_size=(2, 5)):
        assert count() == 10
        assert count(compressed_size=4) == 16
    assert count() == 9
    model.config.compressed_size = 2
    assert count() == 4
    expected = model(images, compressed_size=5).last_hidden_state
    model.config.compressed_size = 5
    assert torch.equal(model(images).last_hidden_state, expected)
    assert torch.equal(model(images, compressed_size=[5, 5]).last_hidden_state, expected)


def test_training_draws_from_the_sizes_that_fit():
    model, images = tiny_lookupvit(LookupViTModel, compressed_sizes=(2, (3, 1), 6, 9)).train(), random_images()

    def counts(number=40):
        return [model(images).compressed_hidden_state.shape[1] for _ in range(number)]

    torch.manual_seed(0)
    drawn = counts()
    assert set(drawn) == {4, 3, 36}
    torch.manual_seed(0)
    assert counts() == drawn
    assert model(images, compressed_size=5).compressed_hidden_state.shape[1] == 25
    with with_budget(model, compressed_size=5):
        assert set(counts(10)) == {25}
    small = random_images(2, 16, 16)
    assert {model(small).compressed_hidden_state.shape[1] for _ in range(10)} == {4}
    with pytest.raises(ValueError, match=r"compressed_sizes must hold a size that fits the grid of 1 x 2 tokens"):
        model(random_images(2, 8, 16))
    model.eval()
    assert set(counts(5)) == {9}


def test_pooling():
    images = random_images()
    for pooling in ("both", "compressed", "lookup"):
        output = tiny_lookupvit(LookupViTModel, pooling=pooling)(images)
        compressed, lookup = output.compressed_hidden_state.mean(1), output.last_hidden_state.mean(1)
        expected = {"both": compressed + lookup, "compressed": compressed, "lookup": lookup}[pooling]
        torch.testing.assert_close(output.pooler_output, expected)


# ---------------------------------------------------------------------------------------------------------------- video


@pytest.mark.parametrize("num_frames", [2, 4, 10])
def test_videos_of_any_length(num_frames):
    model = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO)
    videos = random_videos(2, num_frames, 48, 61)
    output = model(videos, labels=torch.tensor([0, 3]))
    assert output.logits.shape == (2, 5)
    streams = model.lookupvit(videos)
    assert streams.last_hidden_state.shape == (2, num_frames // 2 * 6 * 8, 32)
    assert streams.compressed_hidden_state.shape == (2, min(num_frames // 2, 3) * 9, 32)
    given = model.lookupvit(videos, compressed_size=(1, 2, 5)).compressed_hidden_state
    assert given.shape == (2, 10, 32)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 3])))


def test_tubelets_in_order_of_frames_rows_and_columns():
    model = tiny_lookupvit(LookupViTModel, **VIDEO)
    videos, projection = random_videos(1, 6), model.embeddings.patch_embeddings.projection
    patches = model.embeddings.patch_embeddings(videos)
    assert patches.shape == (1, 32, 3, 6, 6)
    cube = videos[0, 2:4, :, 8:16, 40:48]  # second tubelet, second row, last column
    expected = torch.einsum("tcyx,octyx->o", cube, projection.weight) + projection.bias
    torch.testing.assert_close(patches[0, :, 1, 1, 5], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- outputs, heads


def test_attentions_and_hidden_states_on_request():
    model, images = tiny_lookupvit(LookupViTModel, drop_path_rate=0.5), random_images()
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 36)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 36, 32)] * 4
    torch.testing.assert_close(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    some = model(images, output_hidden_states=[1, -1]).hidden_states
    assert [states is not None for states in some] == [False, True, False, True]
    plain = model(images)
    assert plain.attentions is None
    assert plain.hidden_states is None


@pytest.mark.parametrize("model_class", IMAGE_CLASSES)
def test_return_dict_false_gives_the_same_values_as_a_tuple(model_class):
    model = tiny_lookupvit(model_class)
    named = model(random_images(), output_hidden_states=True)
    plain = model(random_images(), output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named.to_tuple())
    torch.testing.assert_close(plain[0], named.to_tuple()[0])


@pytest.mark.parametrize("reshape", [True, False])
def test_backbone_maps_are_the_models_hidden_states(reshape):
    backbone = tiny_lookupvit(LookupViTBackbone, reshape_hidden_states=reshape, out_features=["stem", "stage2"])
    model = LookupViTModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict(), strict=False)
    images = random_images(2, 40, 61)
    states = model(images, output_hidden_states=True).hidden_states
    output = backbone(images)
    assert backbone.channels == [32, 32]
    for feature_map, index in zip(output.feature_maps, (0, 2), strict=True):
        expected = model.layernorm(states[index])
        sequence = torch.cat([expected.mean(1, keepdim=True), expected], dim=1)
        torch.testing.assert_close(feature_map, expected.mT.reshape(2, 32, 5, 8) if reshape else sequence)


def test_segmentation_upsamples_the_head_on_the_lookup_grid():
    model, images = tiny_lookupvit(LookupViTForSemanticSegmentation), random_images(2, 45, 61)
    labels = torch.randint(0, 5, (2, 45, 61))
    labels[:, :20] = 255
    output = model(images, labels=labels)
    maps = model.decode_head.classifier(model.lookupvit(images).last_hidden_state).mT.view(2, 5, 6, 8)
    expected = F.interpolate(maps, size=(48, 64), mode="bilinear")[..., :45, :61]
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[:, :, 20:], labels[:, 20:]))


# ------------------------------------------------------------------------------------------------- training and systems


@pytest.mark.parametrize("model_class", IMAGE_CLASSES)
def test_a_batch_equals_single_images(model_class):
    model, images = tiny_lookupvit(model_class), random_images(3, 40, 56)
    batch = main_output(model(images))
    for index in range(3):
        torch.testing.assert_close(main_output(model(images[index : index + 1]))[0], batch[index], rtol=1e-4, atol=1e-5)
    assert torch.equal(main_output(model(images)), batch)


@pytest.mark.parametrize("implementation", ["sdpa", *slow("flex_attention")])
def test_attention_implementations_agree(implementation):
    model, images = tiny_lookupvit(LookupViTForSemanticSegmentation), random_images()
    model.set_attn_implementation("eager")
    expected = model(images, compressed_size=4).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(images, compressed_size=4).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("video", [False, True])
def test_half_precision(dtype, tolerance, video):
    if video:
        model, pixels = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO), random_videos()
    else:
        model, pixels = tiny_lookupvit(LookupViTForSemanticSegmentation), random_images(2, 40, 61)
    logits = copy.deepcopy(model).to(dtype)(pixels).logits
    assert logits.dtype == dtype
    assert (logits.float() - model(pixels).logits).abs().median() < tolerance


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_grad(reentrant):
    """The compressed size too is drawn once: it is not drawn again for the backward pass."""

    def gradients(checkpointing):
        model = tiny_lookupvit(LookupViTForSemanticSegmentation, attention_probs_dropout_prob=0.2).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        images = random_images().requires_grad_()
        torch.manual_seed(5)
        for _ in range(3):
            model(images, labels=torch.zeros(2, 48, 48, dtype=torch.int64)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (LookupViTForSemanticSegmentation, {}),
        (LookupViTForImageClassification, {}),
        (LookupViTForImageClassification, {"pooling": "lookup"}),
        (LookupViTForVideoClassification, VIDEO),
    ],
)
def test_every_parameter_gets_a_gradient_grad(model_class, settings):
    model = tiny_lookupvit(model_class, **settings).train()
    pixels = random_videos() if settings == VIDEO else random_images()
    segments = model_class is LookupViTForSemanticSegmentation
    labels = torch.zeros(2, *([48, 48] if segments else []), dtype=torch.int64)
    for size in model.config.compressed_sizes:
        model.zero_grad()
        model(pixels, labels=labels, compressed_size=size).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_dropout_and_stochastic_depth_act_in_training_only():
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        model, images = tiny_lookupvit(LookupViTModel, **{name: 0.7}), random_images(8)
        for training in (False, True):
            model.train(training)
            states = [model(images, compressed_size=3).last_hidden_state for _ in range(2)]
            assert torch.equal(*states) != training


@pytest.mark.parametrize("video", [False, *slow(True)])
def test_compiles_into_one_graph_for_every_batch_size(video):
    torch.compiler.reset()
    if video:
        model, make = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO), lambda b: random_videos(b, 6, 40, 56)
    else:
        model, make = tiny_lookupvit(LookupViTForSemanticSegmentation), lambda b: random_images(b, 40, 56)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch_size in (1, 2, 3):
        pixels = make(batch_size)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_models_take_budgets_and_train_at_the_configured_one_grad():
    torch.compiler.reset()
    model, images = tiny_lookupvit(LookupViTForImageClassification).train(), random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in (2, (3, 4)):
        expected = model(images, compressed_size=size).logits
        torch.testing.assert_close(compiled(images, compressed_size=size).logits, expected, rtol=1e-4, atol=1e-5)
        with with_budget(model, compressed_size=size):
            torch.testing.assert_close(compiled(images).logits, expected, rtol=1e-4, atol=1e-5)
    model(images, labels=torch.tensor([1, 2]), compressed_size=3).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled(images, labels=torch.tensor([1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    model, images = tiny_lookupvit(LookupViTForSemanticSegmentation), random_images()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(images).logits, model(images).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("video", [False, True])
def test_exports_with_a_dynamic_batch(video):
    if video:
        model, make = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO), random_videos
    else:
        model, make = tiny_lookupvit(LookupViTForSemanticSegmentation), random_images
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (make(2),), dynamic_shapes={"pixel_values": {0: batch}}, strict=False)
    torch.testing.assert_close(program.module()(make(5)).logits, model(make(5)).logits, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- start from a plain ViT


def plain_vit(model_class=ViTModel, **settings):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
             "patch_size": 8, "image_size": 48, "initializer_range": 0.2}  # fmt: skip
    return model_class(ViTConfig(**{**sizes, **settings})).eval()


@pytest.mark.parametrize("source", [ViTModel, ViTForImageClassification])
def test_weights_of_a_vit(source, caplog):
    native = plain_vit(source, id2label={0: "cat", 1: "dog", 2: "owl"})
    encoder = native if source is ViTModel else native.vit
    model = LookupViTForImageClassification.from_vit(native, compressed_sizes=(2, 4), compressed_size=2)
    ours = model.lookupvit
    assert (model.config.mlp_ratio, model.config.compressed_size, model.config.num_labels) == (3, 2, 3)
    assert model.config.id2label[2] == "owl"
    patches = encoder.embeddings.patch_embeddings.projection
    assert torch.equal(ours.embeddings.patch_embeddings.projection.weight, patches.weight)
    assert torch.equal(ours.embeddings.position_embeddings, encoder.embeddings.position_embeddings[:, 1:])
    assert not ours.embeddings.compressed_position_embeddings.any()
    for block, layer in zip(ours.layers, encoder.layers, strict=True):
        for part in (block.attention, block.gather):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                assert torch.equal(getattr(part, name).weight, getattr(layer.attention, name).weight)
        assert torch.equal(block.infuse.v_proj.bias, layer.attention.v_proj.bias)
        assert torch.equal(block.infuse.o_proj.weight, layer.attention.o_proj.weight)
        assert torch.equal(block.mlp.fc2.weight, layer.mlp.fc2.weight)
        strength = layer.mlp.fc1.weight.norm(dim=1) * layer.mlp.fc2.weight.norm(dim=0)
        kept = strength >= strength.sort(descending=True).values[15]
        assert torch.equal(block.lookup_mlp.fc1.weight, layer.mlp.fc1.weight[kept])
        assert torch.equal(block.lookup_mlp.fc2.weight, layer.mlp.fc2.weight[:, kept])
    assert torch.equal(ours.compressed_layernorm.weight, encoder.layernorm.weight)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ailurus_hf")] == [
        "the head of LookupViTForImageClassification is new and random"
    ]
    assert model.eval()(random_images()).logits.isfinite().all()


def test_what_does_not_fit_is_left_random_and_logged(caplog):
    native = plain_vit()
    model = LookupViTModel.from_vit(native, patch_size=16, num_hidden_layers=4, mlp_ratio=2)
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("ailurus_hf")]
    assert message.startswith("not in the ViT, or of another shape, and so left random: embeddings.patch_embeddings")
    for name in ("layers.0.mlp.fc1.weight", "layers.3.attention.q_proj.weight"):
        assert name in message
    assert "layers.0.attention" not in message
    weight = model.embeddings.patch_embeddings.projection.weight
    assert 0 < weight.std() < 1
    assert model(random_images()).last_hidden_state.isfinite().all()


def test_a_still_video_is_embedded_as_its_picture():
    native = plain_vit()
    images = LookupViTModel.from_vit(native, image_size=64)
    videos = LookupViTModel.from_vit(native, image_size=64, num_frames=6, tubelet_size=3)
    picture = random_images(1, 64, 64)
    _, expected = images.embeddings(images.embeddings.patch_embeddings(picture), (3, 3))
    still = picture[:, None].expand(-1, 6, -1, -1, -1)
    _, lookup = videos.embeddings(videos.embeddings.patch_embeddings(still), (1, 3, 3))
    torch.testing.assert_close(lookup, expected.repeat(1, 2, 1))


def test_features_correlate_with_those_of_a_trained_vit_from_the_start():
    """Cosine of features, each centred over the tokens of all pictures; a random start gives about 0."""
    folder = Path(ailurus_hf.__file__).parent / "demo" / "checkpoint"
    teacher = AiluRusForSemanticSegmentation.from_pretrained(folder, keep_ratio=1.0).eval()
    pictures = [draw_scene(seed, 128, 256).image for seed in range(2)]
    pixels = AiluRusImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    expected = teacher.ailurus(pixels).last_hidden_state[:, 1:]

    def similarity(model):
        features = model.eval()(pixels).last_hidden_state
        return F.cosine_similarity(*(one - one.mean((0, 1)) for one in (features, expected)), dim=-1).mean()

    model = LookupViTModel.from_vit(teacher)
    assert similarity(model) > 0.2
    assert similarity(LookupViTModel(model.config)).abs() < 0.1


def test_from_a_folder_and_from_own_models(tmp_path):
    teacher = tiny_model(AiluRusModel, layerscale_value=0.5, num_register_tokens=2)
    teacher.save_pretrained(tmp_path)
    model = LookupViTModel.from_vit(tmp_path)
    scale = teacher.layers[0].layer_scale1.lambda1
    torch.testing.assert_close(
        model.layers[0].infuse.o_proj.weight, scale[:, None] * teacher.layers[0].attention.o_proj.weight
    )
    assert torch.equal(model.embeddings.position_embeddings, teacher.embeddings.position_embeddings[:, 1:])
    with pytest.raises(TypeError, match=r"vit must be a plain vision transformer .* got AiluRusModel"):
        LookupViTModel.from_vit(tiny_model(AiluRusModel, use_swiglu_ffn=True))
    with pytest.raises(TypeError, match="got Linear"):
        LookupViTModel.from_vit(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 48), "pixel_values must be (batch_size, num_channels, height, width), got shape (3, 48)"),
        ((1, 2, 3, 48, 48), "got shape (1, 2, 3, 48, 48)"),
        ((1, 4, 48, 48), "pixel_values must have num_channels=3 channels, got 4"),
        ((1, 3, 7, 48), "pixel_values must be at least one patch of 8 x 8 pixels, got height and width (7, 48)"),
        ((1, 3, 48, 16), "compressed_size must be at most the grid of 6 x 2 tokens, got 3"),
    ],
)
@pytest.mark.parametrize("model_class", IMAGE_CLASSES)
def test_refuses_wrong_pixel_values(model_class, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_lookupvit(model_class)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 48, 48), "(batch_size, num_frames, num_channels=3, height, width), as the model is one of video, got"),
        ((1, 3, 4, 48, 48), "got shape (1, 3, 4, 48, 48)"),
        ((1, 5, 3, 48, 48), "a number of frames that tubelet_size=2 divides, got 5; leave out 1 or repeat the last 1"),
        ((1, 0, 3, 48, 48), "a number of frames that tubelet_size=2 divides, got 0"),
        ((1, 4, 3, 48, 5), "at least one patch of 8 x 8 pixels, got height and width (48, 5)"),
    ],
)
def test_refuses_wrong_videos(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_lookupvit(LookupViTForVideoClassification, **VIDEO)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "must hold numbers above 0, got 0"),
        (7, "compressed_size must be at most the grid of 6 x 6 tokens, got 7"),
        ((3, 7), "at most the grid of 6 x 6 tokens, got (3, 7)"),
        ((3, 3, 3), "compressed_size must be one number or 2 of them, (rows, columns), got (3, 3, 3)"),
    ],
)
def test_refuses_compressed_sizes(size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_lookupvit(LookupViTModel)(random_images(), compressed_size=size)


def test_refuses_misspelt_keywords_and_settings_of_other_methods():
    for name in ("compresed_size", "keep_ratio"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            tiny_lookupvit(LookupViTModel)(random_images(), **{name: 1})


@pytest.mark.parametrize("model_class", IMAGE_CLASSES[1:])
def test_images_and_videos_are_kept_apart(model_class):
    with pytest.raises(ValueError, match=f"num_frames must be 1 for {model_class.__name__}, .* got 4"):
        tiny_lookupvit(model_class, **VIDEO)
    with pytest.raises(ValueError, match="num_frames must be at least 2 for LookupViTForVideoClassification, got 1"):
        tiny_lookupvit(LookupViTForVideoClassification)


def test_factory_config_is_small():
    assert sum(parameter.numel() for parameter in tiny_lookupvit(LookupViTModel).parameters()) < 80_000
