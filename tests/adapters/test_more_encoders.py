"""Towers of two-tower models, detectors, pose, and encoders with relative bias, queries or windows."""

from functools import partial

import torch

# Named in some versions of transformers only.
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
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
    ZoeDepthConfig,
    ZoeDepthForDepthEstimation,
)

from tests.adapters.test_vit_like import BACKBONE, SQUARE, TINY, with_backbone
from tests.adapters.tester import Case, FamilyTests, images, outputs, square_images
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


def optional(name, class_name, config_name, settings, inputs=square_images, backbone=None, **kwargs):
    """A case for a family that this version of transformers may not have."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        return []
    if backbone is not None:
        settings = {**settings, "backbone_config": transformers.Tipsv2VisionConfig(**backbone)}
    return [Case(name, model_class, getattr(transformers, config_name), settings, inputs, **kwargs)]


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
        ),
        Case(
            "yolos-plain",
            YolosForObjectDetection,
            YolosConfig,
            {**TINY, "image_size": [48, 64], "num_detection_tokens": 5, "use_mid_position_embeddings": False},
        ),
        Case("vitpose", VitPoseForPoseEstimation, vitpose, {"num_labels": 5}),
        *optional(
            "radio",
            "RadioModel",
            "RadioConfig",
            {**WITHOUT_MLP, "max_img_size": 64},
            images,
        ),
        *optional("sapiens2", "Sapiens2Model", "Sapiens2Config", SQUARE),
        *optional("tipsv2", "Tipsv2VisionModel", "Tipsv2VisionConfig", WITHOUT_MLP),
        *optional(
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
        Case("data2vec", Data2VecVisionModel, Data2VecVisionConfig, DATA2VEC, square_images, compiled=True),
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
        *optional("eomt_dinov3", "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", {**SQUARE, **QUERIES}),
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


class TestWindows(FamilyTests):
    """Windows are folded into the batch, and tokens are clustered inside each; global layers join the windows."""

    cases = [
        Case(
            "lw_detr",
            LwDetrViTBackbone,
            LwDetrViTConfig,
            {
                **WINDOWS, "pretrain_image_size": 64, "num_windows": 4, "num_windows_side": 2,
                "window_block_indices": [0, 2],
            },
            square_images,
        ),
        *optional(
            "rf_detr", "RfDetrDinov2Backbone", "RfDetrDinov2Config",
            {**WINDOWS, "num_windows": 2, "window_block_indexes": [0, 2]},
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


class TestMaps(FamilyTests):
    """SAM 3: windows between layers with global attention, and tokens are merged around each of the latter."""

    cases = optional(
        "sam3", "Sam3ViTModel", "Sam3ViTConfig",
        {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 64, "pretrain_image_size": 64, "patch_size": 8, "window_size": 4,
            "global_attn_indexes": [1, 3],
        },
    )  # fmt: skip

    def test_layers_run_on_merged_tokens(self, case):
        model, shapes = case.adapted(), {}
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(
                lambda _, args, index=index: shapes.update({index: tuple(args[0].shape[1:3])}) or None
            )
        model(**case.inputs(1))
        assert shapes == {0: (8, 8), 1: (1, 16), 2: (8, 8), 3: (1, 16)}
