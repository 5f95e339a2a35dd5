"""The benchmark scripts run, on tiny models: what they measure there means nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from transformers import SamVisionConfig, SamVisionModel, ViTConfig, ViTModel

from ailurus_hf import AiluRusForSemanticSegmentation
from ailurus_hf.data import LabelRule, SegmentationFolder
from ailurus_hf.data.label_maps import pair_files
from ailurus_hf.demo.scenes import draw_scene
from tests.factories import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["vit", "sam"])
def test_adapters(name):
    script = load("benchmark_adapters")
    sam = SamVisionConfig(**SIZES, image_size=64, window_size=2, global_attn_indexes=[1, 3], output_channels=8)
    models = {
        "vit": (lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64, image_size=64)), (64, 64)),
        "sam": (lambda: SamVisionModel(sam), (64, 64)),
    }
    script.MODELS[name] = models[name]
    seconds, shares = script.measure(name, 1, script.torch.float32, False, "region_merging")
    assert len(seconds[0.25]) == 1
    assert 0 < shares[0] < 5
    assert shares[1] < 1


def test_segformer(capsys):
    script = load("benchmark_segformer")
    script.DEPTHS["b1"] = (2, 2, 2, 2)
    script.main(size=["b1"], height=32, width=64, rounds=1, cluster_layer=1)
    assert "transformers" in capsys.readouterr().out


def test_training(tmp_path, capsys):
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained(tmp_path)
    load("benchmark_training").main(str(tmp_path), 48, 48, 1, [0.5], rounds=1)
    assert "0.5" in capsys.readouterr().out


def test_scenes_are_drawn_for_evaluate(tmp_path):
    load("train_demo").draw(tmp_path, scenes=2, first_seed=5)
    sample = SegmentationFolder(pair_files(tmp_path / "images", tmp_path / "labels"), LabelRule(9))[1]
    expected = draw_scene(6)
    assert (np.asarray(sample.image) == expected.image).all()
    assert (sample.labels == expected.labels).all()
