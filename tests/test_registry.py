"""One table of architectures: what it registers, when, and that one row and one folder add another."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PreTrainedConfig
from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ailurus_hf import AiluRusImageProcessor, save_with_code
from ailurus_hf.architectures.row import SEGMENTATION, TASKS
from ailurus_hf.benchmark import count_flops
from ailurus_hf.cli.app import main
from ailurus_hf.registry import ARCHITECTURES, architecture_of, has_architecture, register_architecture
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import random_images, tiny_lookupvit, tiny_model, tiny_segformer
from tests.toy_architecture import TOY

TINY = {"ailurus": tiny_model, "ailurus_segformer": tiny_segformer, "lookupvit": tiny_lookupvit}
ROWS = pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=ARCHITECTURES)


@ROWS
class TestRows:
    """Each row on a tiny model."""

    def test_it_names_a_configuration_a_processor_and_models(self, row: Any) -> None:
        config_class = row.load("AutoConfig")
        assert config_class.model_type == row.model_type
        assert set(row.classes) - set(TASKS) == {"AutoConfig", "AutoImageProcessor"}
        for auto_class in row.models.values():
            assert row.load(auto_class).config_class is config_class

    def test_stages_are_those_that_the_model_runs(self, row: Any) -> None:
        model = TINY[row.model_type](row.load(SEGMENTATION))
        if row.budget == "compressed_size":
            for size in (2, (3, 5)):
                model.config.compressed_size = size
                output = model.base_model(random_images(1, 64, 100))
                (stage,) = row.stages(model.config, 64, 100)
                streams = output.last_hidden_state, output.compressed_hidden_state
                assert (stage.num_tokens, stage.num_kept) == tuple(stream.shape[1] for stream in streams)
            return
        for ratio, count in ((1, None), (0.3, None), (0.5, 3)):
            model.config.keep_ratio, model.config.num_clusters = ratio, count
            stages = row.stages(model.config, 64, 100)
            output = model(random_images(1, 64, 100))
            assignments = output.assignment if isinstance(output.assignment, tuple) else (output.assignment,)
            assert [stage.num_tokens for stage in stages] == [assignment.shape[1] for assignment in assignments]
            assert [stage.num_kept for stage in stages] == [int(found.max()) + 1 for found in assignments]
            assert (min(stage.num_kept / stage.num_tokens for stage in stages) < 1) == (ratio < 1)

    def test_it_describes_every_class(self, row: Any) -> None:
        config = TINY[row.model_type](row.load("AutoModel")).config
        for auto_class in row.models.values():
            assert ("head" in row.facts(config, auto_class)) == (auto_class == SEGMENTATION)
        assert row.settings(config)[row.budget] == getattr(config, row.budget)
        assert row.example.startswith(f"{row.budget}=")
        assert any("Budget" in line for line in row.card(config))


def test_rows_are_found_by_model_type() -> None:
    """Code that a checkpoint brought along has classes of its own."""

    class Foreign(PreTrainedConfig):
        model_type = "ailurus"

    assert architecture_of(Foreign()).model_type == "ailurus"
    Foreign.model_type = "vit"
    assert not has_architecture(Foreign())
    assert not has_architecture(None)
    with pytest.raises(TypeError, match="'ailurus_segformer' or 'lookupvit', got Foreign with 'vit'"):
        architecture_of(Foreign())


# ----------------------------------------------------------------------------------------------- in a fresh interpreter

LOADING = """
import sys
from transformers import (AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification,
                          AutoModelForSemanticSegmentation, pipeline)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
import ailurus_hf
for name, folder in zip(("AiluRus", "AiluRusSegformer", "LookupViT"), sys.argv[1:]):
    config = AutoConfig.from_pretrained(folder)
    found = [config, AutoModel.from_pretrained(folder), AutoModelForSemanticSegmentation.from_pretrained(folder),
             AutoBackbone.from_config(config), AutoImageProcessor.from_pretrained(folder)]
    names = ["Config", "Model", "ForSemanticSegmentation", "Backbone"]
    classes = [getattr(ailurus_hf, name + end) for end in names] + [ailurus_hf.AiluRusImageProcessor]
    assert [type(one) for one in found] == classes, found
    assert type(pipeline("image-segmentation", model=folder).model) is classes[2]
classifier = AutoModelForImageClassification.from_config(AutoConfig.for_model("ailurus", num_hidden_layers=3))
assert type(classifier) is ailurus_hf.AiluRusForImageClassification
"""


def in_fresh_interpreter(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for row in ARCHITECTURES.values():
        folder = tmp_path_factory.mktemp(row.model_type)
        TINY[row.model_type](row.load(SEGMENTATION)).save_pretrained(folder)
        AiluRusImageProcessor().save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel",
        # transformers imports AutoModel half-way through modules that these are made from.
        "import ailurus_hf; from transformers import ViTModel",
        "from ailurus_hf import AiluRusModel",
    ],
)
def test_the_order_of_imports_does_not_matter(first: str, folders: list[str]) -> None:
    in_fresh_interpreter(first + LOADING, *folders)


def test_configurations_alone(folders: list[str]) -> None:
    code = """
import sys
import ailurus_hf
from transformers import AutoConfig
print(*(AutoConfig.from_pretrained(folder).model_type for folder in sys.argv[1:]))
assert not [name for name in sys.modules if name.startswith("ailurus_hf.modeling.modeling")]
"""
    assert in_fresh_interpreter(code, *folders).split() == list(ARCHITECTURES)


def test_import_help_and_version_need_no_torch() -> None:
    code = """
import sys
import ailurus_hf
from ailurus_hf.cli.app import app, main
commands = [command.callback.__name__ for command in app.registered_commands]
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in commands)):
    assert main(arguments) == 0
heavy = {"accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy", "pandas", "PIL", "safetensors",
         "torch", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    assert "Usage: ailurus-hf visualize" in in_fresh_interpreter(code)


# --------------------------------------------------------------------------------------------- one more architecture


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model of an architecture that is in the table for the length of a test; the working folder holds it too."""
    monkeypatch.chdir(tmp_path)
    register_architecture(TOY)
    config_class = TOY.load("AutoConfig")
    try:
        model = TOY.load(SEGMENTATION)(config_class(num_labels=NUM_LABELS, semantic_loss_ignore_index=IGNORE)).eval()
        model.save_pretrained("toy")
        AiluRusImageProcessor().save_pretrained("toy")
        yield model
    finally:
        del ARCHITECTURES["toy"]
        del configuration_auto.CONFIG_MAPPING._extra_content["toy"]
        mappings = [getattr(modeling_auto, auto_class)._model_mapping for auto_class in TOY.models.values()]
        for mapping in (image_processing_auto.IMAGE_PROCESSOR_MAPPING, *mappings):
            del mapping._extra_content[config_class]


class TestOneRowMore:
    def test_auto_classes(self, toy: Any) -> None:
        assert type(AutoModelForSemanticSegmentation.from_pretrained("toy")) is type(toy)
        assert type(AutoModel.from_pretrained("toy")) is type(toy.toy)
        assert type(AutoImageProcessor.from_pretrained("toy")) is AiluRusImageProcessor

    def test_code_and_card(self, toy: Any) -> None:
        folder = save_with_code(toy, "shared")
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModelForSemanticSegmentation"] == "modeling_toy.ToyForSemanticSegmentation"
        card = (folder / "README.md").read_text()
        for wanted in ("A toy, 6 wide.", "pipeline_tag: image-segmentation", f"- Classes: {NUM_LABELS}."):
            assert wanted in card
        code = """
import sys
sys.modules["ailurus_hf"] = None  # as if not installed
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained("shared", trust_remote_code=True)
print(type(model).__name__)
"""
        assert in_fresh_interpreter(code).strip() == "ToyForSemanticSegmentation"

    def test_flops(self, toy: Any) -> None:
        tokens, size = 16 * 24 // 16, 6
        patches, classes = 2 * tokens * 3 * 16 * size, 2 * tokens * size * NUM_LABELS
        for kept in (tokens, tokens // 2):
            merging = 2 * 2 * tokens * kept * size
            expected = patches + classes + merging + 2 * kept * size * size
            assert count_flops(toy, 16, 24, keep_ratio=kept / tokens) == expected

    def test_info(self, toy: Any, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        assert main(["info", "toy", "--json"]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["architecture"]["hidden size"] == 6
        assert report["merging"] == {"keep_ratio": 0.5}
        assert report["one image of 16 x 16 pixels"]["tokens after merging"] == 8

    def test_predict_and_visualize(self, toy: Any, capfd: pytest.CaptureFixture[str]) -> None:
        Image.fromarray(np.zeros((16, 24, 3), dtype=np.uint8)).save("x.png")
        capfd.readouterr()
        assert main(["predict", "x.png", "--model", "toy", "--keep-ratio", "0.25", "--json"]) == 0
        [report] = json.loads(capfd.readouterr().out)
        assert (report["patches"], report["tokens"]) == (24, 6)
        assert main(["visualize", "x.png", "--model", "toy"]) == 0
        assert capfd.readouterr().out.startswith("12 of 24 tokens, ")

    def test_evaluate(self, toy: Any, capfd: pytest.CaptureFixture[str]) -> None:
        write_camvid(Path("data"))
        capfd.readouterr()
        data = ["--images", "data/val/images", "--labels", "data/val/labels"]
        assert main(["evaluate", "--model", "toy", *data, "--keep-ratio", "0.5", "--json"]) == 0
        dense, merged = json.loads(capfd.readouterr().out)["budgets"]
        assert merged["gflops"] < dense["gflops"]


def test_it_is_gone_afterwards() -> None:
    assert "toy" not in ARCHITECTURES
    with pytest.raises(ValueError, match="Unrecognized model identifier"):
        AutoConfig.for_model("toy")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_config(TOY.load("AutoConfig")())
    assert torch.is_tensor(tiny_model(ARCHITECTURES["ailurus"].load("AutoModel"))(random_images())[0])
