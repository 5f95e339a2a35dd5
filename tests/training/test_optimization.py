"""Layer-wise learning rates, and budgets that change during training."""

import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BeitConfig,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    EomtConfig,
    EomtForUniversalSegmentation,
    SamVisionConfig,
    SamVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TrainerControl,
    TrainerState,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ailurus_hf import (
    AiluRusBackbone,
    AiluRusForSemanticSegmentation,
    AiluRusSegformerForSemanticSegmentation,
    apply_ailurus,
)
from ailurus_hf.training import KeepRatioSchedule, freeze_layers, layerwise_parameter_groups
from tests.factories import random_images, tiny_config, tiny_model, tiny_segformer


def rates(model, **settings):
    """Learning rate and weight decay of every parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layerwise_parameter_groups(model, 1.0, 0.1, **settings)
    listed = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(listed) == len({name for name, _, _ in listed})
    return {name: (rate, decay) for name, rate, decay in listed}


def upernet(backbone):
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8))


def on_backbone():
    return upernet(tiny_config(out_features=["stage1", "stage2", "stage3", "stage4"]))


def dpt():
    backbone = tiny_config(out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    config = DPTConfig(
        backbone_config=backbone, is_hybrid=False, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, hidden_size=32
    )
    return DPTForDepthEstimation(config)


def adapted():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 64, "patch_size": 8}
    backbone = BeitConfig(num_hidden_layers=4, out_indices=[1, 2, 3, 4], use_relative_position_bias=True, **sizes)
    return apply_ailurus(upernet(backbone), keep_ratio=0.5)


def lora():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"])
    return get_peft_model(tiny_model(AiluRusForSemanticSegmentation, decoder_type="mask_transformer"), config)


def native_segformer():
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            depths=DEPTHS, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=8,
            sr_ratios=[2, 1, 1, 1],
        )
    )  # fmt: skip


def two_towers():
    tower = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config={"num_hidden_layers": 2, "vocab_size": 20, **tower},
            vision_config={"num_hidden_layers": 4, "image_size": 32, "patch_size": 8, **tower},
            projection_dim=16, extract_layers=[1, 2, 3], reduce_dim=16, decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
    )  # fmt: skip


def eomt():
    return EomtForUniversalSegmentation(
        EomtConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, num_blocks=1,
            num_queries=3,
        )
    )  # fmt: skip


DEPTHS = (2, 3, 3, 2)
STARTS = (0, 2, 5, 8)  # the first block of each stage among all ten


def stages(path, patches, blocks, norm):
    """Of the ten blocks: what stands between two of them learns like the second."""
    expected = {rf"{path}{patches.format(stage)}\..*": 10 - start for stage, start in enumerate(STARTS)}
    expected[rf"{path}{patches.format(0)}\..*"] = 11
    for stage, depth in enumerate(DEPTHS):
        for index in range(depth):
            expected[rf"{path}{blocks.format(stage)}\.{index}\..*"] = 10 - STARTS[stage] - index
        expected[rf"{path}{norm.format(stage)}\..*"] = 10 - STARTS[stage + 1] if stage < 3 else 0
    return expected


def plain(path, *after, embeddings=("embeddings",), layers="layers", num_layers=4):
    """Embeddings, layers, and what learns like the head."""
    expected = dict.fromkeys((rf"{path}{name}\..*" for name in embeddings), num_layers + 1)
    expected |= {rf"{path}{layers}\.{index}\..*": num_layers - index for index in range(num_layers)}
    return expected | dict.fromkeys((rf"{name}(\..*)?" for name in after), 0)


# How often the decay is applied to each parameter, by patterns of their names.
LEVELS = {
    "own": (
        partial(tiny_model, AiluRusForSemanticSegmentation, num_register_tokens=2, decoder_type="mask_transformer"),
        plain(r"ailurus\.", r"ailurus\.layernorm", "decode_head"),
    ),
    "own backbone": (partial(tiny_model, AiluRusBackbone), plain("", "layernorm")),
    "own SegFormer": (
        partial(tiny_segformer, AiluRusSegformerForSemanticSegmentation),
        stages(r"segformer\.stages\.", r"{}\.patch_embeddings", r"{}\.blocks", r"{}\.layer_norm")
        | {r"decode_head\..*": 0},
    ),
    "SegFormer": (
        native_segformer,
        stages(r"segformer\.", r"stages\.{}\.patch_embeddings", r"stages\.{}\.blocks", r"stages\.{}\.layer_norm")
        | {r"decode_head\..*": 0},
    ),
    "adapted UperNet": (
        adapted, plain(r"backbone\.beit\.", "decode_head", "auxiliary_head"),
    ),
    "UperNet": (on_backbone, plain(r"backbone\.", r"backbone\.layernorm", "decode_head", "auxiliary_head")),
    "DPT": (dpt, plain(r"backbone\.", r"backbone\.layernorm", "neck", "head")),
    "PEFT": (
        lora,
        plain(r"base_model\.model\.ailurus\.", r"base_model\.model\.(ailurus\.layernorm|decode_head)"),
    ),
    "two towers": (
        two_towers,
        plain(r"clip\.vision_model\.", r"clip\.(vision_model\.post_layernorm|logit_scale|.*_projection)", "decoder",
              embeddings=("embeddings", "pre_layrnorm"), layers=r"encoder\.layers")
        | plain(r"clip\.text_model\.", r"clip\.text_model\.final_layer_norm", layers=r"encoder\.layers", num_layers=2),
    ),
    "EoMT": (eomt, plain("", "layernorm", "query", "upscale_block", "mask_head", "class_predictor")),
}  # fmt: skip


# peft 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LEVELS)
def test_layers_near_the_input_learn_more_slowly(name):
    """Every parameter, by its depth."""
    build, expected = LEVELS[name]
    model = build().requires_grad_(True)
    found = rates(model, layer_decay=0.5)
    assert found.keys() == dict(model.named_parameters()).keys()
    for parameter, (rate, _) in found.items():
        assert [0.5**level for pattern, level in expected.items() if re.fullmatch(pattern, parameter)] == [rate], (
            parameter
        )
    for pattern in expected:
        assert any(re.fullmatch(pattern, parameter) for parameter in found), pattern


# peft 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", LEVELS)
def test_frozen_layers_are_those_near_the_input(name):
    build, expected = LEVELS[name]
    most = max(expected.values()) - 1
    for count in (1, 2, most):
        model = build().requires_grad_(True)
        freeze_layers(model, count)
        for parameter, value in model.named_parameters():
            to_head = next(level for pattern, level in expected.items() if re.fullmatch(pattern, parameter))
            layers = 2 if "text_model" in parameter else most
            assert value.requires_grad == (to_head == 0 or layers + 1 - to_head > count), parameter
    with pytest.raises(ValueError, match=f"from 0 to the number of layers {most}, got {most + 1}"):
        freeze_layers(model, most + 1)


def test_without_layers_there_are_no_levels():
    model = nn.Sequential(nn.Linear(2, 2))
    assert {rate for rate, _ in rates(model).values()} == {1}
    with pytest.raises(ValueError, match="layer_decay must be 1 for Sequential, which has no encoder with layers"):
        layerwise_parameter_groups(model, 1.0, layer_decay=0.5)
    with pytest.raises(ValueError, match="number of layers 0, got 1"):
        freeze_layers(model, 1)


def test_only_matrices_and_kernels_decay():
    found = rates(tiny_model(AiluRusForSemanticSegmentation, num_register_tokens=2, decoder_type="mask_transformer"))
    for name, (rate, decay) in found.items():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decay == (0.1 if is_matrix else 0.0), name
        assert rate == 1


def test_tables_of_positions_and_tokens_do_not_decay():
    """Whatever transformers calls them, and whether they are parameters or embeddings."""
    for model, names in (
        (two_towers(), ["position_embedding.weight", "token_embedding.weight"]),
        (SamVisionModel(SamVisionConfig(num_hidden_layers=1, image_size=64)), ["pos_embed"]),
        (eomt(), ["query.weight", "position_embeddings.weight", "register_tokens"]),
    ):
        found = rates(model)
        for name in names:
            decays = {decay for parameter, (_, decay) in found.items() if parameter.endswith(name)}
            assert decays == {0.0}, name


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
