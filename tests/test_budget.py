"""Budgets for a call, for a block of code, for a thread; on everything that may hold an encoder that merges."""

import asyncio
import copy
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from ailurus_hf import (
    AiluRusBackbone,
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusModel,
    AiluRusSegformerForSemanticSegmentation,
    AiluRusSegformerModel,
    apply_ailurus,
    with_budget,
)
from ailurus_hf.budget import has_budget, keep_ratio_of, set_keep_ratio
from ailurus_hf.training import KeepRatioSchedule
from tests.factories import random_images, tiny_config, tiny_model, tiny_segformer, tiny_segformer_config

# peft 0.21 reads a name that transformers 5.23 renamed.
PEFT_READS_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}


def num_groups(model, **call):
    with torch.no_grad():
        return model(random_images(), **call).group_sizes.shape[1]


def adapted_vit(**settings):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, intermediate_size=64)).eval()
    return apply_ailurus(model, **{"cluster_layer": 1, "keep_ratio": 0.5, **settings})


def lengths(model, layers, inputs=None):
    """Number of tokens that the last layer runs on."""
    seen = []
    handle = layers[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        model(random_images() if inputs is None else inputs)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------------ own models


@pytest.mark.parametrize(
    "model_class", [AiluRusModel, AiluRusBackbone, AiluRusForSemanticSegmentation, AiluRusForImageClassification]
)
def test_a_budget_for_one_call(model_class):
    model = tiny_model(model_class, num_clusters=7)
    assert num_groups(model, keep_ratio=0.25) == 9  # a ratio given with the call wins over an older exact number
    assert num_groups(model, num_clusters=5) == 5
    assert num_groups(model, keep_ratio=0.25, num_clusters=5) == 5
    assert num_groups(model) == 7
    assert model.config.num_clusters == 7
    with pytest.raises(ValueError, match=r"'keep_ratio'.*above 0 and at most 1, got 0"):
        num_groups(model, keep_ratio=0.0)


def test_a_budget_for_one_call_of_stages():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, stage_keep_ratios=(1, 1, 0.5, 1))

    def kept(**call):
        return [sizes.shape[1] for sizes in model(random_images(2, 64, 64), **call).group_sizes]

    assert kept() == [256, 64, 8, 4]
    assert kept(keep_ratio=0.25) == [256, 64, 4, 1]
    assert kept(stage_keep_ratios=(0.5, 0.5, 0.5, 0.5)) == [128, 32, 8, 2]
    assert kept(keep_ratio=1) == [256, 64, 16, 4]
    with with_budget(model, stage_keep_ratios=(0.25, 1, 1, 1)):
        assert kept() == [64, 64, 16, 4]
        assert kept(keep_ratio=0.25) == [256, 64, 4, 1]
    assert model.config.stage_keep_ratios == (1, 1, 0.5, 1)


def test_blocks_nest_and_leave_nothing():
    model = tiny_model(AiluRusModel, num_clusters=7)
    before = model.config.to_dict()
    with with_budget(model, keep_ratio=0.25):
        assert num_groups(model) == 9
        assert keep_ratio_of(model) == 0.25
        with with_budget(model, num_clusters=3, grouping="grid"):
            assert num_groups(model) == 3
            with with_budget(model, keep_ratio=1):
                assert num_groups(model) == 36
        assert num_groups(model, keep_ratio=0.5) == 18
        with pytest.raises(ZeroDivisionError), with_budget(model, keep_ratio=0.5):
            raise ZeroDivisionError
        assert num_groups(model) == 9
        assert model.config.to_dict() == before
    assert num_groups(model) == 7


def test_copies_and_other_models_keep_their_own():
    model, other = tiny_model(AiluRusModel), tiny_model(AiluRusModel)
    twin = copy.deepcopy(model)
    with with_budget(model, keep_ratio=0.25):
        assert [num_groups(each) for each in (model, twin, other)] == [9, 18, 18]


def test_mistakes():
    model = tiny_model(AiluRusModel)
    with (
        pytest.raises(TypeError, match="AiluRusModel has no setting 'keep_ration'"),
        with_budget(model, keep_ration=0.5),
    ):
        pass
    with pytest.raises(ValueError, match="must be above 0 and at most 1, got 2"), with_budget(model, keep_ratio=2):
        pass
    with pytest.raises(ValueError, match="must be one of 'density_peaks'"), with_budget(model, grouping="gird"):
        pass
    linear = torch.nn.Linear(1, 1)
    assert not has_budget(linear)
    with (
        pytest.raises(TypeError, match="Linear merges no tokens, so it has no budget"),
        with_budget(linear, keep_ratio=1),
    ):
        pass
    with pytest.raises(TypeError, match="Linear merges no tokens"):
        set_keep_ratio(linear, 0.5)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        set_keep_ratio(model, 0.0)
    assert model.config.keep_ratio == 0.5


# -------------------------------------------------------------------------------------------------- threads and tasks


@pytest.mark.parametrize("kind", ["own", "adapted"])
def test_threads_have_budgets_of_their_own(kind):
    """Four threads, 300 forwards, one model."""
    model = tiny_model(AiluRusModel) if kind == "own" else adapted_vit()
    ratios, images = (0.1, 0.25, 0.5, 1.0), random_images(1)

    def forward(ratio):
        with with_budget(model, keep_ratio=ratio), torch.no_grad():
            return model(images).last_hidden_state

    expected, wrong = {ratio: forward(ratio) for ratio in ratios}, []

    def work(first):
        for step in range(75):
            ratio = ratios[(first + step) % 4]
            if not torch.equal(forward(ratio), expected[ratio]):
                wrong.append((first, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tasks_have_budgets_of_their_own():
    model, found = tiny_model(AiluRusModel), {}

    async def work(ratio):
        with with_budget(model, keep_ratio=ratio):
            await asyncio.sleep(0)
            found[ratio] = num_groups(model)

    async def main():
        await asyncio.gather(*(work(ratio) for ratio in (0.25, 0.5, 1.0)))

    asyncio.run(main())
    assert found == {0.25: 9, 0.5: 18, 1.0: 36}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_follow():
    model = tiny_model(AiluRusModel, neighborhood_size=8)
    compiled, images = torch.compile(model, fullgraph=True, backend="eager"), random_images()
    plain = compiled(images)
    with with_budget(compiled, keep_ratio=0.25):
        merged = compiled(images)
        assert merged.group_sizes.shape[1] == num_groups(model) == 9
    assert compiled(images).group_sizes.shape[1] == plain.group_sizes.shape[1] == 18
    assert compiled(images, keep_ratio=0.75).group_sizes.shape[1] == 27
    adapted = adapted_vit(neighborhood_size=8)
    whole = torch.compile(adapted, fullgraph=True, backend="eager")
    with with_budget(whole, keep_ratio=0.25):
        expected = adapted(images).last_hidden_state
        torch.testing.assert_close(whole(images).last_hidden_state, expected)
    assert not torch.equal(whole(images).last_hidden_state, expected)


# ------------------------------------------------------------------------------------------------ inside other models


def upernet(backbone_config):
    config = UperNetConfig(
        backbone_config=backbone_config, hidden_size=16, num_labels=3, use_auxiliary_head=False, pool_scales=[1]
    )
    torch.manual_seed(0)
    return UperNetForSemanticSegmentation(config).eval()


def own_inside_upernet():
    model = upernet(tiny_config(out_features=["stage1", "stage2", "stage3", "stage4"]))
    return model, model.backbone.layers


def own_inside_dpt():
    backbone = tiny_config(out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    torch.manual_seed(0)
    model = DPTForDepthEstimation(DPTConfig(backbone_config=backbone, is_hybrid=False, **sizes)).eval()
    return model, model.backbone.layers


def adapted_inside_depth_anything():
    backbone = Dinov2Config(
        **SIZES, mlp_ratio=2, out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False
    )
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8, "patch_size": 8}
    torch.manual_seed(0)
    config = DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=32, **sizes)
    model = DepthAnythingForDepthEstimation(config).eval()
    apply_ailurus(model, cluster_layer=1, keep_ratio=0.5)
    return model, model.backbone.encoder.layer


def own_inside_peft():
    model = tiny_model(AiluRusForSemanticSegmentation)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    return wrapped, model.ailurus.layers


def several_encoders():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.adapted = tiny_model(AiluRusModel), adapted_vit()

        def forward(self, pixel_values):
            return self.own(pixel_values), self.adapted(pixel_values)

    model = Pair()
    return model, [model.own.layers[-1], model.adapted.layers[-1]]


CARRIERS = [own_inside_upernet, own_inside_dpt, adapted_inside_depth_anything, own_inside_peft, several_encoders]


@pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
@pytest.mark.parametrize("make", CARRIERS)
def test_whatever_holds_an_encoder(make):
    model, layers = make()
    assert lengths(model, layers) == 19
    with with_budget(model, keep_ratio=0.25):
        assert keep_ratio_of(model) == 0.25
        assert [lengths(model, [layer]) for layer in list(layers)[-1:]] == [10]
    assert lengths(model, layers) == 19
    set_keep_ratio(model, 0.25)
    assert lengths(model, layers) == 10
    assert lengths(model, list(layers)[-2:-1]) == 10
    assert lengths(torch.nn.ModuleList([model])[0], layers) == 10


@pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
@pytest.mark.parametrize("make", [own_inside_upernet, own_inside_peft, lambda: (adapted_vit(), None)])
def test_schedules_change_what_other_models_hold(make, tmp_path):
    model, _ = make()
    seen = []

    class Note(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"pixel_values": torch.zeros(3, 48, 48)}

    class Only(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(keep_ratio_of(model))
            return torch.zeros(())

    args = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    Only(model, args, train_dataset=Note(), callbacks=[KeepRatioSchedule([(0, 1.0), (0.5, 0.25)])]).train()
    assert seen == [1.0, 1.0, 0.25, 0.25]


# ------------------------------------------------------------------------------------------------ keyword arguments


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (tiny_model(AiluRusModel), 48),
        (tiny_model(AiluRusBackbone), 48),
        (tiny_model(AiluRusForSemanticSegmentation), 48),
        (tiny_model(AiluRusForImageClassification), 48),
        (tiny_segformer(AiluRusSegformerModel), 64),
        (tiny_segformer(AiluRusSegformerForSemanticSegmentation), 64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_keywords(model, size):
    images = random_images(1, size, size)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep_ration'; did you mean 'keep_ratio'"):
        model(images, keep_ration=0.3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'interpolate_pos_encoding'"):
        model(images, interpolate_pos_encoding=True)
    # What transformers passes to any model, and wrappers that pass nothing on.
    model(images, num_items_in_batch=1, inputs_embeds=None, return_dict=True)


@pytest.mark.filterwarnings(PEFT_READS_AN_OLD_NAME)
def test_callers_that_pass_more():
    encoder = tiny_model(AiluRusModel)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    decoder = BertLMHeadModel(BertConfig(vocab_size=17, is_decoder=True, add_cross_attention=True, **sizes))
    captioner = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    captioner.config.decoder_start_token_id, captioner.config.pad_token_id = 1, 0
    captioner(pixel_values=random_images(), labels=torch.ones(2, 3, dtype=torch.long), output_hidden_states=True)
    with with_budget(captioner, keep_ratio=0.25):
        captions = captioner.generate(
            random_images(), max_new_tokens=3, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
        )
    assert captions.shape[0] == 2
    backbone = tiny_model(AiluRusBackbone)
    backbone.forward_with_filtered_kwargs(random_images(), output_hidden_states=True, keep_ratio=0.25)
    own = get_peft_model(tiny_model(AiluRusModel), LoraConfig(target_modules=["q_proj"]))
    own(random_images(), keep_ratio=0.25)


def test_segformer_calls_its_encoder():
    """Hooks, FSDP and device maps on the encoder fire because it is called."""
    model, seen = tiny_segformer(AiluRusSegformerForSemanticSegmentation), []
    model.segformer.register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    output = model(random_images(1, 64, 64))
    assert seen == ["AiluRusSegformerModelOutput"]
    assert output.hidden_states is None
    maps = model(random_images(1, 64, 64), output_hidden_states=[1]).hidden_states
    assert [each is None for each in maps] == [True, False, True, True]
    assert tiny_segformer_config().stage_ratios == (1, 1, 0.5, 0.5)
