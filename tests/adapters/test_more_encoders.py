"""Towers of two-tower models, detectors, pose, and encoders with relative bias, queries or windows."""

from functools import partial

import pytest
import torch
import transformers
from transformers import (
    BeitBackbone,
    BeitConfig,
    BeitModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPVisionConfig,
    CLIPVisionModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    Dinov2Config,
    EomtConfig,
    EomtForUniversalSegmentation,
    LwDetrForObjectDetection,
    LwDetrViTBackbone,
    LwDetrViTConfig,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    PromptDepthAnythingConfig,
    PromptDepthAnythingForDepthEstimation,
    SiglipVisionConfig,
    SiglipVisionModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VideoMAEConfig,
    VideoMAEModel,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.adapters.inner import PackedPositions
from ailurus_hf.adapters.layer_call import LayerCall
from ailurus_hf.modeling.reduction import Grouping, registered
from tests.adapters.test_vit_like import BACKBONE, SQUARE, TINY, with_backbone
from tests.adapters.tester import (
    Case,
    FamilyTests,
    assert_close,
    differ,
    images,
    outputs,
    random_permutation,
    square_images,
)
from tests.factories import random_images

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50,
    "max_position_embeddings": 16, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0,
}  # fmt: skip
WITHOUT_MLP = {name: value for name, value in SQUARE.items() if name != "intermediate_size"}
RELATIVE = {**SQUARE, "layer_scale_init_value": 0.1}
DATA2VEC = {**SQUARE, "use_relative_position_bias": True}
ABSOLUTE = {**RELATIVE, "use_absolute_position_embeddings": True}


def with_text(batch_size):
    return {**square_images(batch_size), "input_ids": torch.tensor([[48, 3, 4, 49]] * batch_size)}


def two_towers(config_class, **settings):
    return config_class(vision_config=SQUARE, text_config=TEXT, **settings)


def vitpose(**settings):
    backbone = VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=[48, 64], patch_size=[8, 8],
        out_features=["stage4"],
    )  # fmt: skip
    return VitPoseConfig(backbone_config=backbone, **settings)


def beit_backbone(**settings):
    return BeitConfig(**RELATIVE, out_features=["stage1", "stage2", "stage3", "stage4"], **settings)


def by_name(name, class_name, config_name, settings, inputs=square_images, backbone=None, **kwargs):
    """A case of classes given by name, with a backbone of TIPS if wanted."""
    if backbone is not None:
        settings = {**settings, "backbone_config": transformers.Tipsv2VisionConfig(**backbone)}
    config = config_name if callable(config_name) else getattr(transformers, config_name)
    return Case(name, getattr(transformers, class_name), config, settings, inputs, **kwargs)


class TestTowers(FamilyTests):
    cases = [
        Case("clip", CLIPVisionModel, CLIPVisionConfig, SQUARE, square_images),
        Case("siglip", SiglipVisionModel, SiglipVisionConfig, SQUARE, square_images),
        Case(
            "clipseg",
            CLIPSegForImageSegmentation,
            partial(two_towers, CLIPSegConfig),
            {
                "projection_dim": 16, "extract_layers": [1, 2, 3], "reduce_dim": 16, "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 32, "conditional_layer": 0,
            },
            with_text,
        ),
        Case("owlvit", OwlViTForObjectDetection, partial(two_towers, OwlViTConfig), {"projection_dim": 32}, with_text),
        Case("owlv2", Owlv2ForObjectDetection, partial(two_towers, Owlv2Config), {"projection_dim": 32}, with_text),
    ]  # fmt: skip


class TestHeads(FamilyTests):
    cases = [
        Case(
            "yolos",
            YolosForObjectDetection,
            YolosConfig,
            {**TINY, "image_size": [48, 64], "num_detection_tokens": 5},
            num_suffix=5,
        ),
        Case(
            "yolos-plain",
            YolosForObjectDetection,
            YolosConfig,
            {**TINY, "image_size": [48, 64], "num_detection_tokens": 5, "use_mid_position_embeddings": False},
            num_suffix=5,
        ),
        Case("vitpose", VitPoseForPoseEstimation, vitpose, {"num_labels": 5}),
        by_name(
            "radio",
            "RadioModel",
            "RadioConfig",
            {**WITHOUT_MLP, "max_img_size": 64},
            images,
        ),
        by_name("sapiens2", "Sapiens2Model", "Sapiens2Config", SQUARE),
        by_name("tipsv2", "Tipsv2VisionModel", "Tipsv2VisionConfig", WITHOUT_MLP),
        by_name(
            "tipsv2_dpt",
            "Tipsv2DptForDepthEstimation",
            "Tipsv2DptConfig",
            {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8},
            backbone={**WITHOUT_MLP, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
        ),
        Case(
            "prompt_depth_anything",
            PromptDepthAnythingForDepthEstimation,
            lambda **settings: with_backbone(
                PromptDepthAnythingConfig,
                Dinov2Config(**BACKBONE, reshape_hidden_states=False, apply_layernorm=True),
                **settings,
            ),
            {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "patch_size": 8},
            images,
        ),
    ]


def test_packed_images_are_refused():
    model = apply_ailurus(transformers.RadioModel(transformers.RadioConfig(**WITHOUT_MLP, max_img_size=64)).eval())
    patches, grids = torch.randn(48 + 12, 3 * 8 * 8), torch.tensor([[6, 8], [3, 4]])
    with pytest.raises(ValueError, match="packed in one sequence have no common grid"):
        model(patches, image_grid_hw=grids)
    remove_ailurus(model)
    assert model(patches, image_grid_hw=grids).features.shape[0] == 60


class TestRelativeBias(FamilyTests):
    cases = [
        Case(
            "beit",
            BeitModel,
            BeitConfig,
            {**RELATIVE, "use_relative_position_bias": True},
            square_images,
        ),
        Case("beit-absolute", BeitModel, BeitConfig, ABSOLUTE, square_images),
        Case(
            "beit-backbone-shared",
            BeitBackbone,
            beit_backbone,
            {"use_shared_relative_position_bias": True, "reshape_hidden_states": True},
            square_images,
        ),
        Case(
            "beit-eager",
            BeitModel,
            partial(BeitConfig, attn_implementation="eager"),
            {**RELATIVE, "use_relative_position_bias": True},
            square_images,
        ),
        Case("data2vec", Data2VecVisionModel, Data2VecVisionConfig, DATA2VEC, square_images),
        Case(
            "data2vec-shared",
            Data2VecVisionModel,
            Data2VecVisionConfig,
            {**DATA2VEC, "use_relative_position_bias": False, "use_shared_relative_position_bias": True},
            square_images,
        ),
        Case(
            "data2vec-eager", Data2VecVisionModel, partial(Data2VecVisionConfig, attn_implementation="eager"), DATA2VEC,
            square_images,
        ),
        Case(
            "zoedepth",
            ZoeDepthForDepthEstimation,
            partial(
                with_backbone,
                ZoeDepthConfig,
                beit_backbone(use_relative_position_bias=True, reshape_hidden_states=False),
            ),
            {
                "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "bottleneck_features": 8,
                "num_relative_features": 8, "bin_embedding_dim": 8, "patch_transformer_hidden_size": 8,
                "patch_transformer_intermediate_size": 16, "patch_transformer_num_attention_heads": 2,
                "backbone_hidden_size": 32, "num_attractors": [4, 2, 2, 1],
            },
            square_images,
        ),
        Case(
            "upernet-beit",
            UperNetForSemanticSegmentation,
            partial(
                with_backbone,
                UperNetConfig,
                beit_backbone(use_relative_position_bias=True, reshape_hidden_states=True),
            ),
            {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "num_labels": 3},
            square_images,
        ),
    ]  # fmt: skip


ONEFORMER = {
    "num_queries": 5, "hidden_dim": 32, "mask_dim": 32, "conv_dim": 32, "encoder_feedforward_dim": 32,
    "encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32, "num_attention_heads": 2, "text_encoder_width": 32,
    "text_encoder_num_layers": 1, "text_encoder_context_length": 8, "text_encoder_vocab_size": 50, "task_seq_len": 8,
    "is_training": False, "num_labels": 3,
}  # fmt: skip


def with_task(batch_size):
    return {**square_images(batch_size), "task_inputs": torch.arange(8.0).expand(batch_size, -1)}


class TestOneFormer(FamilyTests):
    cases = [
        Case(
            "oneformer",
            OneFormerForUniversalSegmentation,
            partial(with_backbone, OneFormerConfig),
            ONEFORMER,
            with_task,
        )
    ]


QUERIES = {"num_blocks": 1, "num_queries": 6, "num_labels": 3, "num_upscale_blocks": 1}


class TestQueries(FamilyTests):
    """EoMT: the queries join after the layers that run on merged tokens."""

    cases = [
        Case(
            "eomt", EomtForUniversalSegmentation, EomtConfig, {**WITHOUT_MLP, **QUERIES, "mlp_ratio": 2}, square_images
        ),
        by_name("eomt_dinov3", "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", {**SQUARE, **QUERIES}),
    ]

    def test_layers_run_on_merged_tokens(self, case):
        """Four layers, the last with the queries: of the 64 patches the two in the middle see 16."""
        model, lengths = case.adapted(), {}
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(
                lambda _, args, index=index: lengths.update({index: args[0].shape[1]}) or None
            )
        outputs(model, case.inputs(1))
        num_prefix = lengths[0] - 64
        assert lengths == {0: num_prefix + 64, 1: num_prefix + 16, 2: num_prefix + 16, 3: num_prefix + 64 + 6}


WINDOWS = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 64,
    "patch_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


DETECTOR = {
    "d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 2, "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4, "decoder_n_points": 2, "num_queries": 7, "group_detr": 2,
}  # fmt: skip
LW_DETR = {
    **WINDOWS,
    "pretrain_image_size": 64,
    "num_windows": 4,
    "num_windows_side": 2,
    "window_block_indices": [0, 2],
}
RF_DETR = {**WINDOWS, "num_windows": 2, "window_block_indexes": [0, 2]}


def detector(family, backbone, *, projector=None, **settings):
    backbone_config = getattr(transformers, backbone)(**settings)
    return getattr(transformers, f"{family}Config")(backbone_config=backbone_config, **DETECTOR, **(projector or {}))


class TestWindows(FamilyTests):
    """Windows are folded into the batch, and tokens are clustered inside each; global layers join the windows."""

    cases = [
        Case("lw_detr", LwDetrViTBackbone, LwDetrViTConfig, LW_DETR, square_images),
        Case(
            "lw_detr_detector",
            LwDetrForObjectDetection,
            partial(detector, "LwDetr", "LwDetrViTConfig", projector={"projector_scale_factors": [1.0]}),
            LW_DETR,
            square_images,
        ),
        by_name("rf_detr", "RfDetrDinov2Backbone", "RfDetrDinov2Config", RF_DETR),
        by_name(
            "rf_detr_detector", "RfDetrForObjectDetection", partial(detector, "RfDetr", "RfDetrDinov2Config"), RF_DETR,
        ),
    ]  # fmt: skip


def videos(batch_size):
    return {"pixel_values": random_images(4 * batch_size, 64, 64).view(batch_size, 4, 3, 64, 64)}


def jepa_videos(batch_size):
    return {"pixel_values_videos": videos(batch_size)["pixel_values"]}


class TestVideos(FamilyTests):
    """Their attention takes nothing from outside: sizes come in through other arguments."""

    cases = [
        Case(
            "videomae",
            VideoMAEModel,
            VideoMAEConfig,
            {**SQUARE, "num_frames": 4, "tubelet_size": 2},
            videos,
        ),
        Case(
            "vjepa2",
            VJEPA2Model,
            VJEPA2Config,
            {
                "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2, "crop_size": 64,
                "patch_size": 8, "frames_per_clip": 4, "tubelet_size": 2, "pred_hidden_size": 24,
                "pred_num_attention_heads": 4, "pred_num_hidden_layers": 2, "pred_num_mask_tokens": 2,
            },
            jepa_videos,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("keep_ratio", [1, 0.25])
def test_a_head_may_share_the_configuration_of_its_encoder(keep_ratio):
    """The pooler of V-JEPA 2's classifier calls the same attention function, without a size to weigh."""
    settings = {**TestVideos.cases[1].settings, "num_pooler_layers": 1, "num_labels": 3}
    case = Case(
        "classifier", VJEPA2ForVideoClassification, partial(VJEPA2Config, attn_implementation="eager"), settings
    )
    plain = outputs(case.model(), jepa_videos(2))
    found = outputs(case.adapted(keep_ratio), jepa_videos(2))
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in plain.items()}
    assert differ(found, plain) == (keep_ratio != 1)


def test_a_subset_of_the_patches_is_refused():
    call = LayerCall(("hidden_states", "position_mask"), (torch.zeros(1, 4, 2), torch.arange(4)[None]), {})
    with pytest.raises(ValueError, match="position_mask must be None where tokens are merged"):
        PackedPositions(attention="attention").compute(call, merged=None)


@pytest.mark.parametrize("shuffled", [True, False], ids=["another order", "a quarter"])
def test_vjepa2_predicts_between_masks_of_all_tokens(shuffled):
    """The masks of its predictor name places in the full sequence, which is what the encoder hands out."""
    case = TestVideos.cases[1]
    order = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    inputs = {**jepa_videos(2), "context_mask": [order[:, :100]], "target_mask": [order[:, 100:]]}
    model = case.model()
    plain = outputs(model, inputs)
    assert plain[".predictor_output.last_hidden_state"].shape[1] == 28
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.25)
    if shuffled:
        with registered("permutation", Grouping(reduce=random_permutation)):
            assert_close(outputs(apply_ailurus(model, grouping="permutation"), inputs), plain)
    else:
        merged = outputs(model, inputs)
        assert {name: value.shape for name, value in merged.items()} == {n: value.shape for n, value in plain.items()}
        assert differ(merged, plain)
