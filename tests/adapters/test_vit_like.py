"""Plain vision transformers: ViT and its kin, and models that read their feature maps."""

from functools import partial

import torch
from transformers import (
    BitConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    IJepaConfig,
    IJepaForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PixioBackbone,
    PixioConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from tests.adapters.tester import Case, FamilyTests, images, square_images

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8}
FIXED = {**TINY, "image_size": (48, 64)}
SQUARE = {**TINY, "image_size": 64}
DPT = {
    **SQUARE,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 12, 16, 20],
    "fusion_hidden_size": 8,
    "num_labels": 3,
}
BACKBONE = {**SQUARE, "out_indices": [1, 2, 3, 4]}


def mae_inputs(batch_size):
    generator = torch.Generator().manual_seed(1)
    return {**square_images(batch_size), "noise": torch.rand(batch_size, 64, generator=generator)}


def hybrid(**settings):
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8, "num_groups": 2}
    bit = BitConfig(
        **stages, layer_type="bottleneck", out_features=["stage1", "stage2", "stage3"], global_padding="same"
    )
    return DPTConfig(
        **settings, is_hybrid=True, backbone_config=bit, backbone_featmap_shape=[1, 24, 4, 4], readout_type="project"
    )


HYBRID = {**DPT, "patch_size": 16, "neck_hidden_sizes": [8, 16, 16, 20]}


def with_backbone(config_class, backbone=None, **settings):
    return config_class(backbone_config=backbone or Dinov2Config(**BACKBONE), **settings)


def depth_anything(**settings):
    backbone = Dinov2Config(**BACKBONE, reshape_hidden_states=False, apply_layernorm=True)
    return with_backbone(DepthAnythingConfig, backbone, patch_size=8, **settings)


class TestVitLike(FamilyTests):
    cases = [
        Case("vit", ViTForImageClassification, ViTConfig, FIXED, compiled=True),
        Case("vit-eager", ViTModel, partial(ViTConfig, attn_implementation="eager"), FIXED),
        Case("deit", DeiTForImageClassificationWithTeacher, DeiTConfig, FIXED),
        Case("vit_mae", ViTMAEModel, ViTMAEConfig, {**SQUARE, "mask_ratio": 0.0}, mae_inputs),
        Case("vit_msn", ViTMSNForImageClassification, ViTMSNConfig, FIXED),
        Case("ijepa", IJepaForImageClassification, IJepaConfig, FIXED),
        Case("pixio", PixioBackbone, PixioConfig, {**BACKBONE, "n_cls_tokens": 3}, square_images),
        Case("dinov2", Dinov2ForImageClassification, Dinov2Config, SQUARE, images),
        Case("dinov2-backbone", Dinov2Backbone, Dinov2Config, BACKBONE, images),
        Case("registers", Dinov2WithRegistersModel, Dinov2WithRegistersConfig, SQUARE, images),
        Case("registers-backbone", Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig, BACKBONE, images),
        Case("dinov3", DINOv3ViTModel, DINOv3ViTConfig, {**SQUARE, "num_register_tokens": 2}),
        Case("dinov3-backbone", DINOv3ViTBackbone, DINOv3ViTConfig, {**BACKBONE, "num_register_tokens": 2}),
    ]


class TestReaders(FamilyTests):
    """Models that read hidden states or feature maps of an encoder, and need the whole grid there."""

    cases = [
        Case("dpt-depth", DPTForDepthEstimation, DPTConfig, DPT, square_images),
        Case("dpt-segmentation", DPTForSemanticSegmentation, DPTConfig, DPT, square_images),
        Case(
            "dpt-hybrid",
            DPTForDepthEstimation,
            hybrid,
            HYBRID,
            square_images,
        ),
        Case(
            "depth_anything",
            DepthAnythingForDepthEstimation,
            depth_anything,
            {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 8},
            images,
        ),
        Case(
            "upernet",
            UperNetForSemanticSegmentation,
            partial(with_backbone, UperNetConfig),
            {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "num_labels": 3},
            square_images,
        ),
        Case(
            "mask2former",
            Mask2FormerForUniversalSegmentation,
            partial(with_backbone, Mask2FormerConfig),
            {
                "feature_size": 32,
                "mask_feature_size": 32,
                "hidden_dim": 32,
                "encoder_feedforward_dim": 32,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "dim_feedforward": 32,
                "num_attention_heads": 2,
                "num_queries": 5,
            },
            square_images,
        ),
    ]
