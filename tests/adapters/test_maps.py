"""Encoders on maps: windows between layers with global attention, and tokens merged in the latter."""

from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    VitDetBackbone,
    VitDetConfig,
    VitDetModel,
    VitMatteConfig,
    VitMatteForImageMatting,
)

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters.controller import controllers_of
from ailurus_hf.modeling.reduction import GROUPINGS, Grouping, reduce, registered
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings
from tests.adapters.test_more_encoders import by_name
from tests.adapters.tester import (
    Case,
    FamilyTests,
    assert_close,
    images,
    outputs,
    random_permutation,
    square_images,
)
from tests.factories import random_images

SAM_VISION = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 64, "image_size": 64,
    "patch_size": 8, "window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 16, "num_pos_feats": 8,
    "initializer_range": 0.2,
}  # fmt: skip
SAM_DECODER = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
VITDET = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 64,
    "pretrain_image_size": 64, "patch_size": 8, "window_size": 3, "window_block_indices": [0, 2],
    "residual_block_indices": [1, 3], "use_relative_position_embeddings": True, "initializer_range": 0.2,
    "drop_path_rate": 0.3, "out_features": ["stage2", "stage4"],
}  # fmt: skip


def sam(config_class, decoder_settings, **settings):
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {**SAM_DECODER, **decoder_settings}
    return config_class(vision_config=settings, prompt_encoder_config=prompts, mask_decoder_config=decoder)


def with_points(batch_size):
    points = torch.tensor([[[20.0, 30.0], [40.0, 8.0]]]).expand(batch_size, 1, 2, 2)
    return {**square_images(batch_size), "input_points": points}


def matting(batch_size):
    images = random_images(batch_size, 128, 128)
    return {"pixel_values": torch.cat([images, images[:, :1]], dim=1)}


class TestMaps(FamilyTests):
    """Windows between layers with global attention: tokens are merged around or inside each of the latter."""

    cases = [
        by_name(
            "sam3", "Sam3ViTModel", "Sam3ViTConfig",
            {
                "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
                "image_size": 64, "pretrain_image_size": 64, "patch_size": 8, "window_size": 4,
                "global_attn_indexes": [1, 3],
            },
        ),
        Case("sam_vision", SamVisionModel, SamVisionConfig, SAM_VISION, square_images),
        Case("sam_eager", SamVisionModel, partial(SamVisionConfig, attn_implementation="eager"), SAM_VISION,
             square_images),
        Case("sam", SamModel, partial(sam, SamConfig, {}), SAM_VISION, with_points),
        Case("sam_hq", SamHQModel, partial(sam, SamHQConfig, {"vit_dim": 32}), SAM_VISION, with_points),
        Case("vitdet", VitDetModel, VitDetConfig, VITDET, square_images),
        Case(
            "vitdet_absolute",
            VitDetBackbone,
            VitDetConfig,
            {**VITDET, "use_relative_position_embeddings": False},
        ),
        Case(
            "vitmatte",
            VitMatteForImageMatting,
            lambda **settings: VitMatteConfig(
                backbone_config=VitDetConfig(**settings), hidden_size=32, convstream_hidden_sizes=[8, 8, 8],
                fusion_hidden_sizes=[8, 8, 8, 8],
            ),
            {
                **VITDET, "num_channels": 4, "out_features": ["stage4"], "patch_size": 16, "image_size": 128,
                "pretrain_image_size": 128,
            },
            matting,
        ),
    ]  # fmt: skip

    def test_only_patches_are_merged(self, case):
        """There are no other tokens."""

    def test_layers_run_on_merged_tokens(self, case):
        model, shapes = case.adapted(), {}
        layers = controllers_of(model)[0].layers
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(
                lambda _, args, index=index: shapes.update({index: tuple(args[0].shape[1:3])}) or None
            )
        grid = (8, 8) if case.inputs is not images else (6, 8)
        outputs(model, case.inputs(1))
        assert shapes == {0: grid, 1: (1, grid[0] * 2), 2: grid, 3: (1, grid[0] * 2)}


@pytest.mark.parametrize("unfold", ["residual", "copy"])
@pytest.mark.parametrize(
    ("name", "model_class", "config"),
    [("sam", SamVisionModel, SamVisionConfig(**SAM_VISION)), ("vitdet", VitDetModel, VitDetConfig(**VITDET))],
    ids=["sam", "vitdet"],
)
def test_global_layers_equal_attention_to_every_member_of_a_group(name, model_class, config, unfold, monkeypatch):
    """Loops over pairs of tokens: every one of the full grid has its group's mean and its representative's place."""
    case = Case(name, model_class, lambda: config)
    model = case.adapted(unfold=unfold).double()
    layer = controllers_of(model)[0].layers[1]
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(map=args[0], output=output))
    groups = []

    def density_peaks(tokens, grid, num_groups, settings, context):
        reduction = reduce(tokens, grid, num_groups, AdaptiveResolutionSettings(unfold=settings.unfold))
        groups.append(reduction.groups)
        return reduction

    monkeypatch.setitem(GROUPINGS, "noted", Grouping(reduce=density_peaks))
    apply_ailurus(model, grouping="noted")
    with torch.no_grad():
        model(square_images(1)["pixel_values"].double())
    remove_ailurus(model)
    inputs = seen["map"] if name == "sam" else seen["map"].permute(0, 2, 3, 1)
    expected = layer_by_loops(layer, inputs, groups[0], unfold)
    if name == "vitdet":
        with torch.no_grad():
            expected = layer.residual(expected.permute(0, 3, 1, 2))
    output = seen["output"][0] if isinstance(seen["output"], tuple) else seen["output"]
    # In double precision, but for the logarithms of sizes.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def layer_by_loops(layer, inputs, groups, unfold):
    """A layer on maps (1, height, width, hidden_size), each pair of tokens by itself."""
    norm1, norm2 = (layer.layer_norm1, layer.layer_norm2) if hasattr(layer, "attn") else (layer.norm1, layer.norm2)
    attention = layer.attn if hasattr(layer, "attn") else layer.attention
    _, height, width, hidden_size = inputs.shape
    tokens = inputs.reshape(-1, hidden_size)
    assignment = groups.assignment[0].tolist()
    places = [divmod(groups.representatives[0, group].item(), width) for group in assignment]
    members = [[n for n, other in enumerate(assignment) if other == group] for group in assignment]
    means = torch.stack([tokens[same].mean(0) for same in members])
    query, key, value = attention.qkv(norm1(means)).view(-1, 3, 4, hidden_size // 4).unbind(1)
    attended = torch.empty_like(query)
    for head in range(4):
        for i, (row, column) in enumerate(places):
            scores = []
            for j, (other_row, other_column) in enumerate(places):
                score = query[i, head] @ key[j, head] * (hidden_size // 4) ** -0.5
                score += query[i, head] @ attention.rel_pos_h[row - other_row + height - 1]
                score += query[i, head] @ attention.rel_pos_w[column - other_column + width - 1]
                scores.append(score)
            attended[i, head] = torch.stack(scores).softmax(0) @ value[:, head]
    merged = means + attention.proj(attended.flatten(1))
    merged = merged + layer.mlp(norm2(merged))
    result = merged if unfold == "copy" else merged + tokens - means
    return result.view(1, height, width, hidden_size)


def test_map_layers_refuse_what_they_cannot_do():
    eager = SamVisionConfig(**SAM_VISION, attn_implementation="eager")
    model = Case("sam", SamVisionModel, lambda: eager).adapted()
    with pytest.raises(ValueError, match="output_attentions=True is not possible where tokens are merged"):
        model(**square_images(1), output_attentions=True)
    with pytest.raises(ValueError, match="must leave a layer with global attention, which are \\[1, 3\\]"):
        apply_ailurus(model, cluster_layer=2, tail_layers=1)
    with pytest.raises(ValueError, match="at least one patch"):
        Case("vitdet", VitDetModel, VitDetConfig, VITDET).adapted()(torch.zeros(1, 3, 4, 64))
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="tables of relative positions are offloaded"):
        model(**square_images(1))


def test_maps_of_another_size_resize_their_tables():
    """Tables made for 8 x 8 patches, on 4 x 6: the order of merged tokens does not matter, so distances are right."""
    model = VitDetModel(VitDetConfig(**VITDET)).eval()
    inputs = {"pixel_values": random_images(2, 32, 48)}
    plain = outputs(model, inputs)
    with registered("permutation", Grouping(reduce=random_permutation)):
        assert_close(outputs(apply_ailurus(model, cluster_layer=1, grouping="permutation"), inputs), plain)
