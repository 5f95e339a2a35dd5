import time

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from ailurus_hf import (
    AiluRusBackbone,
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusModel,
    LookupViTModel,
)
from ailurus_hf.benchmark import count_flops, keep_ratio_at, speed_up, time_side_by_side
from ailurus_hf.data import LabelledImage
from ailurus_hf.evaluation import evaluate_segmentation
from tests.factories import tiny_config, tiny_lookupvit, tiny_model


def layer_flops(tokens, size=32, hidden=64):
    """Projections, two products of attention, MLP; one multiply-add is two operations."""
    return 2 * (4 * tokens * size**2 + 2 * tokens**2 * size + 2 * tokens * size * hidden)


def test_dense_flops_follow_the_formula():
    model = tiny_model(AiluRusModel, keep_ratio=1)
    patches = 2 * 36 * 3 * 8 * 8 * 32
    assert count_flops(model, 48, 48) == patches + 4 * layer_flops(37)


def test_merged_flops_follow_the_formula():
    model = tiny_model(AiluRusModel, keep_ratio=0.25, grouping="density_peaks")
    patches, distances = 2 * 36 * 3 * 8 * 8 * 32, 3 * 18 * 36 * 32  # pairs: all of 36 tokens
    everywhere = 2 * 36 * 9 * 32  # every token against every representative
    expected = patches + 2 * layer_flops(37) + 2 * layer_flops(10) + distances + everywhere
    assert count_flops(model, 48, 48) == expected


@pytest.mark.parametrize("model_class", [AiluRusForSemanticSegmentation, AiluRusBackbone])
def test_settings_change_the_count_but_not_the_model(model_class):
    model = tiny_model(model_class, keep_ratio=0.25)
    before = model.config.to_dict()
    counts = [count_flops(model, 41, 61, keep_ratio=ratio) for ratio in (0.25, 0.5, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2]
    assert model.config.to_dict() == before
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("settings", [{}, {"grouping": "density_peaks"}, {"cluster_layer": 2}])
def test_a_share_of_tokens_for_a_cost(settings):
    model = tiny_model(AiluRusModel)
    dense = count_flops(model, 48, 48, keep_ratio=1)
    count = round(keep_ratio_at(model, 48, 48, 1.4, **settings) * 36)
    costs = [dense / count_flops(model, 48, 48, keep_ratio=kept / 36, **settings) for kept in (count, count + 1)]
    assert costs[0] >= 1.4 > costs[1]


def test_settings_that_a_model_lacks_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep_ration'; did you mean 'keep_ratio'"):
        count_flops(tiny_model(AiluRusModel), 48, 48, keep_ration=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'keep_ratio'"):
        keep_ratio_at(tiny_lookupvit(LookupViTModel), 48, 48, 1.5)


def test_large_models_are_counted_without_their_memory():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = AiluRusModel(tiny_config(**sizes, patch_size=16, image_size=640))
    flops = count_flops(model, 640, 640, keep_ratio=1.0)
    assert 1.2e12 < flops < 1.25e12  # 608 G multiply-adds


# peft 0.21 reads a name that transformers 5.23 renamed.
PEFT_READS_AN_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(model, rank=4):
    return get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])).eval()


@PEFT_READS_AN_OLD_NAME
def test_layers_that_peft_adds_are_counted():
    model = tiny_model(AiluRusModel, keep_ratio=0.25, cluster_layer=2)
    plain = count_flops(model, 48, 48)
    wrapped = lora(tiny_model(AiluRusModel, keep_ratio=0.25, cluster_layer=2))
    added = 2 * 2 * (2 * 32 * 4)  # two projections, each by way of 4 numbers, for a token
    assert count_flops(wrapped, 48, 48) == plain + added * (2 * 37 + 2 * 10)
    assert count_flops(wrapped, 48, 48, keep_ratio=1) == count_flops(model, 48, 48, keep_ratio=1) + added * 4 * 37
    assert wrapped.get_base_model().config.keep_ratio == 0.25
    assert {parameter.device.type for parameter in wrapped.parameters()} == {"cpu"}


@PEFT_READS_AN_OLD_NAME
@pytest.mark.parametrize(
    ("views", "forwards"),
    [
        ({}, [(40, 56)]),
        ({"flip": True}, [(40, 56)] * 2),
        pytest.param({"scales": (0.5, 1), "flip": True}, [(20, 28)] * 2 + [(40, 56)] * 2, marks=pytest.mark.slow),
        ({"sliding_window": True}, [(32, 32)] * 6),  # two rows of windows, at 0, 16, 24 along the width
        pytest.param({"sliding_window": True, "flip": True}, [(32, 32)] * 12, marks=pytest.mark.slow),
    ],
)
def test_evaluation_counts_every_forward(views, forwards):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(40, 56, 3), dtype=np.uint8))
    samples = [LabelledImage(image, np.zeros((40, 56), dtype=np.int64), "a picture")]
    for wrap in (lambda model: model, lora):
        model = wrap(tiny_model(AiluRusForSemanticSegmentation, window_size=32, window_stride=16))
        report = evaluate_segmentation(model, AiluRusImageProcessor(), samples, (0.25,), progress=False, **views)
        for result in report.budgets:
            counts = {size: count_flops(model, *size, keep_ratio=result.keep_ratio) for size in set(forwards)}
            assert result.gflops == pytest.approx(sum(counts[size] for size in forwards) / 1e9)


def test_variants_take_turns():
    calls = []
    seconds = time_side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, rounds=3, warmup=1
    )
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert min(seconds["b"]) >= 0.01


def test_speed_up_pairs_the_rounds():
    assert speed_up([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == (3.0, 2.5, 3.5)
    assert speed_up([3.0], [2.0]) == (1.5, 1.5, 1.5)
