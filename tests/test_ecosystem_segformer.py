"""The hierarchical models behind transformers' doors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ailurus_hf import (
    AiluRusSegformerBackbone,
    AiluRusSegformerForSemanticSegmentation,
    AiluRusSegformerModel,
    save_with_code,
)
from ailurus_hf.benchmark import count_flops
from tests.factories import random_images, tiny_segformer, tiny_segformer_config


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, AiluRusSegformerModel),
        (AutoModelForSemanticSegmentation, AiluRusSegformerForSemanticSegmentation),
    ],
)
def test_auto_classes_load_a_folder(auto_class, model_class, tmp_path):
    model = tiny_segformer(model_class)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    images = random_images(2, 64, 64)
    assert torch.equal(loaded(images)[0], model(images)[0])
    budgets = auto_class.from_pretrained(tmp_path, stage_keep_ratios=[0.5, 0.5, 1, 1])(images).group_sizes
    assert [sizes.shape[1] for sizes in budgets] == [128, 32, 16, 4]


def test_backbone_loads_from_a_segmentation_checkpoint(tmp_path):
    whole = tiny_segformer(AiluRusSegformerForSemanticSegmentation)
    whole.save_pretrained(tmp_path)
    part, info = AiluRusSegformerBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    images = random_images(2, 64, 64)
    assert torch.equal(part(images).feature_maps[-1], whole.segformer(images).last_hidden_state)


def test_upernet_on_a_hierarchical_backbone():
    backbone = tiny_segformer_config(out_features=["stage1", "stage2", "stage3", "stage4"])
    assert type(AutoBackbone.from_config(backbone)) is AiluRusSegformerBackbone
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config).eval()
    output = model(random_images(2, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.int64))
    assert output.logits.shape == (2, 3, 64, 64)
    output.loss.backward()
    assert model.backbone.stages[0].blocks[0].mlp.fc1.weight.grad is not None


REMOTE = """
import sys
sys.modules["ailurus_hf"] = None  # as if not installed
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForSemanticSegmentation
folder, images, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True, keep_ratio=0.4).eval()
AutoModel.from_pretrained(folder, trust_remote_code=True)
assert AutoBackbone.from_config(config, trust_remote_code=True).channels == [64]
torch.save(model(torch.load(images)).logits.detach(), out)
"""


def test_exported_code_runs_without_the_package(tmp_path):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation)
    folder = save_with_code(model, tmp_path / "shared-model")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoBackbone", "AutoImageProcessor",
                             "AutoModelForSemanticSegmentation"}  # fmt: skip
    assert {path.name for path in folder.glob("*.py")} == {
        "configuration_ailurus.py",  # of the other heads in the same file
        "configuration_ailurus_segformer.py",
        "class_colours.py",
        "image_processing_ailurus.py",
        "label_maps.py",
        "layers_ailurus.py",
        "modeling_ailurus_segformer.py",
        "grouping_density_peaks.py",
        "grouping_grid.py",
        "grouping_region_merging.py",
        "heads_segmentation.py",
        "reduction.py",
        "settings.py",
        "size_weighted_attention.py",
        "token_groups.py",
    }
    assert "tokens kept per stage: 1, 1, 0.5, 0.5" in (folder / "README.md").read_text()
    images = random_images(2, 64, 64)
    torch.save(images, tmp_path / "images.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", REMOTE, *arguments], check=True, env=environment, cwd=tmp_path)
    model.config.keep_ratio = 0.4
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images).logits)


def test_flops_fall_with_the_budget_and_count_the_distances():
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, grouping="density_peaks")
    counts = [count_flops(model, 128, 128, keep_ratio=ratio) for ratio in (0.25, 0.5, 1)]
    assert counts == sorted(counts)
    assert len(set(counts)) == 3
    less = count_flops(model, 128, 128, neighborhood_size=10)
    assert counts[1] - less == 3 * ((25 - 5) * 64 * 48 + (8 - 5) * 16 * 64)  # of 16 tokens no more are neighbours
