"""The doors to transformers: auto classes, pipeline, saving, remote code, heads of other models."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import ailurus_hf
from ailurus_hf import (
    AiluRusBackbone,
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusModel,
    AiluRusSegformerForSemanticSegmentation,
    save_with_code,
)
from ailurus_hf.visualization import model_palette
from tests.factories import random_images, tiny_config, tiny_model, tiny_segformer


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3).save_pretrained(folder)
    AiluRusImageProcessor(image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def test_public_names():
    assert set(ailurus_hf.__all__) == {
        "__version__",
        "AiluRusBackbone",
        "AiluRusConfig",
        "AiluRusForImageClassification",
        "AiluRusForSemanticSegmentation",
        "AiluRusImageProcessor",
        "AiluRusModel",
        "AiluRusSegformerBackbone",
        "AiluRusSegformerConfig",
        "AiluRusSegformerForSemanticSegmentation",
        "AiluRusSegformerModel",
        "LookupViTBackbone",
        "LookupViTConfig",
        "LookupViTForImageClassification",
        "LookupViTForSemanticSegmentation",
        "LookupViTForVideoClassification",
        "LookupViTModel",
        "LookupViTVideoProcessor",
        "apply_ailurus",
        "convert_checkpoint",
        "register_grouping",
        "remove_ailurus",
        "restore",
        "save_with_code",
        "supported_families",
        "with_budget",
    }
    for name in ailurus_hf.__all__:
        assert getattr(ailurus_hf, name) is not None
        assert name in dir(ailurus_hf)
    with pytest.raises(AttributeError, match="no attribute 'AiluRus'"):
        ailurus_hf.AiluRus  # noqa: B018


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, AiluRusModel),
        (AutoModelForSemanticSegmentation, AiluRusForSemanticSegmentation),
        (AutoModelForImageClassification, AiluRusForImageClassification),
    ],
)
def test_auto_classes_load_a_folder(auto_class, model_class, tmp_path):
    model = tiny_model(model_class, keep_ratio=0.3)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    images = random_images()
    assert torch.equal(loaded(images)[0], model(images)[0])
    config = AutoConfig.from_pretrained(tmp_path)
    config.decode_head.dtype = loaded.dtype  # transformers notes it there when it loads weights
    assert config.to_dict() == loaded.config.to_dict()


def test_auto_backbone_and_auto_image_processor(checkpoint):
    assert type(AutoBackbone.from_config(tiny_config())) is AiluRusBackbone
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    assert type(processor) is AiluRusImageProcessor
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]


def test_encoder_and_backbone_load_from_a_segmentation_checkpoint(checkpoint):
    whole = AiluRusForSemanticSegmentation.from_pretrained(checkpoint)
    for model_class in (AiluRusModel, AiluRusBackbone):
        part, info = model_class.from_pretrained(checkpoint, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(part.layers[0].mlp.fc1.weight, whole.ailurus.layers[0].mlp.fc1.weight)


def test_budget_is_chosen_at_load(checkpoint):
    for ratio, count in ((0.25, 9), (1.0, 36)):
        model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, keep_ratio=ratio)
        assert model(random_images()).group_sizes.shape[1] == count


def test_a_fresh_head_for_other_classes(checkpoint):
    model, info = AiluRusForSemanticSegmentation.from_pretrained(
        checkpoint, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {entry[0] for entry in info["mismatched_keys"]} == {"decode_head.classifier.weight",
                                                                "decode_head.classifier.bias"}  # fmt: skip
    assert model(random_images()).logits.shape[1] == 7
    assert model.decode_head.classifier.weight.std() > 0


@pytest.mark.parametrize("architecture", ["plain", "SegFormer"])
@pytest.mark.parametrize("auto", [False, True])
def test_colours_of_other_classes_are_left_out(tmp_path, caplog, architecture, auto):
    """Where a fresh head is asked for by number or by names; with one warning, unless new colours are given."""
    colours = [[10 * index] * 3 for index in range(7)]
    names = {index: f"class {index}" for index in range(7)}
    if architecture == "plain":
        model = tiny_model(AiluRusForSemanticSegmentation, palette=colours[:5])
    else:
        model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, palette=colours[:5])
    model.save_pretrained(tmp_path / "five")
    load = partial((AutoModelForSemanticSegmentation if auto else type(model)).from_pretrained, tmp_path / "five")
    kept = load(keep_ratio=1.0, num_labels=5)
    assert (kept.config.palette, kept.config.id2label[4]) == (colours[:5], "LABEL_4")
    for classes, expected in (
        ({"num_labels": 7}, "LABEL_6"),
        ({"id2label": names}, "class 6"),
        ({"id2label": names, "num_labels": 7}, "class 6"),
    ):
        caplog.clear()
        other = load(**classes, ignore_mismatched_sizes=True)
        (warning,) = [record for record in caplog.records if record.name.startswith("ailurus_hf")]
        assert warning.getMessage().startswith("left the palette out: it has 5 colours, and 7 classes are asked for")
        assert (other.config.num_labels, other.config.palette, other.config.id2label[6]) == (7, None, expected)
        assert model_palette(other.config).shape == (7, 3)
        other.save_pretrained(tmp_path / "seven")
        assert type(model).from_pretrained(tmp_path / "seven").config.palette is None
        caplog.clear()
        coloured = load(**classes, palette=colours, ignore_mismatched_sizes=True)
        assert coloured.config.palette == colours
        assert not [record for record in caplog.records if record.name.startswith("ailurus_hf")]
    for wrong in ({"palette": colours}, {"num_labels": 7, "palette": colours[:3]}):
        with pytest.raises(ValueError, match="palette must have a colour for each of the num_labels="):
            load(**wrong, ignore_mismatched_sizes=True)


def test_the_bundled_checkpoint_takes_other_classes():
    bundled = Path(ailurus_hf.__file__).parent / "demo" / "checkpoint"
    model = AiluRusForSemanticSegmentation.from_pretrained(bundled, num_labels=7, ignore_mismatched_sizes=True)
    assert (model.config.num_labels, model.config.palette) == (7, None)
    assert model(random_images()).logits.shape[1] == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_half_precision_round_trip(tmp_path, dtype):
    model = tiny_model(AiluRusForSemanticSegmentation, decoder_type="mask_transformer", num_register_tokens=2).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AiluRusForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_pipeline_from_a_folder(checkpoint):
    segment = pipeline("image-segmentation", model=str(checkpoint))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 84, 3), dtype=np.uint8))
    result = segment(image)
    assert sum(np.asarray(entry["mask"], dtype=bool).sum() for entry in result) == 60 * 84
    assert all(entry["mask"].size == (84, 60) for entry in result)


def test_upernet_on_an_ailurus_backbone():
    backbone = tiny_config(keep_ratio=0.3, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config).eval()
    assert isinstance(model.backbone, AiluRusBackbone)
    output = model(random_images(), labels=torch.zeros(2, 48, 48, dtype=torch.int64))
    assert output.logits.shape == (2, 3, 48, 48)
    output.loss.backward()
    assert model.backbone.layers[0].mlp.fc1.weight.grad is not None


def test_dpt_on_an_ailurus_backbone():
    backbone = tiny_config(
        keep_ratio=0.3, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
    )
    config = DPTConfig(
        backbone_config=backbone, hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    model = DPTForDepthEstimation(config).eval()
    assert isinstance(model.backbone, AiluRusBackbone)
    depth = model(random_images(2, 64, 96)).predicted_depth
    assert depth.shape[0] == 2
    assert depth.isfinite().all()


REMOTE = """
import sys
sys.modules["ailurus_hf"] = None  # as if not installed
import torch
from transformers import (AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification,
                          AutoModelForSemanticSegmentation)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, images, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True, keep_ratio=0.4).eval()
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
assert AutoBackbone.from_config(config, trust_remote_code=True).channels == [32]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = processor(torch.load(images).numpy(), return_tensors="pt")["pixel_values"]
torch.save(model(pixels).logits.detach(), out)
model.save_pretrained(out + "-again")
processor.save_pretrained(out + "-again")
AutoModelForSemanticSegmentation.from_pretrained(out + "-again", trust_remote_code=True)
"""


def test_exported_code_runs_without_the_package(tmp_path):
    model = tiny_model(AiluRusForSemanticSegmentation, decoder_type="mask_transformer", num_register_tokens=2)
    folder = save_with_code(model, tmp_path / "shared-model", AiluRusImageProcessor(), license="mit")
    image = torch.randint(0, 255, (3, 50, 70), dtype=torch.uint8)
    torch.save(image, tmp_path / "image.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(folder), str(tmp_path / "image.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", REMOTE, *arguments], check=True, env=environment, cwd=tmp_path)
    model.config.keep_ratio = 0.4
    pixels = AiluRusImageProcessor()(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(pixels).logits)


def test_export_is_complete_and_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model(AiluRusForSemanticSegmentation)
    folder = save_with_code(model, tmp_path / "export")
    # Neither the model nor its class goes on carrying code: a later plain save stays plain.
    assert not hasattr(model.config, "auto_map")
    model.save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoBackbone", "AutoImageProcessor",
                             "AutoModelForSemanticSegmentation", "AutoModelForImageClassification"}  # fmt: skip
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}" in (folder / f"{module}.py").read_text()
    modeling = Path(ailurus_hf.__file__).parent / "modeling"
    for name in (
        "configuration_ailurus",
        "layers_ailurus",
        "modeling_ailurus",
        "grouping_density_peaks",
        "token_groups",
    ):
        assert (folder / f"{name}.py").read_bytes() == (modeling / f"{name}.py").read_bytes()
    card = (folder / "README.md").read_text()
    for wanted in ("license: apache-2.0", "trust_remote_code=True", "keep_ratio", "2311.01197"):
        assert wanted in card


def test_export_refuses_foreign_models_and_existing_folders(tmp_path):
    with pytest.raises(TypeError, match="model must be one of this package's models, got Linear"):
        save_with_code(torch.nn.Linear(2, 2), tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="b"):
        save_with_code(tiny_model(AiluRusModel), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
    save_with_code(tiny_model(AiluRusModel), tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "config.json").exists()


def test_accelerate_places_the_model(checkpoint):
    model = AiluRusForSemanticSegmentation.from_pretrained(checkpoint, device_map="cpu")
    plain = AiluRusForSemanticSegmentation.from_pretrained(checkpoint)
    assert torch.equal(model(random_images()).logits, plain(random_images()).logits)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_fine_tunes_and_evaluates(tmp_path, accumulation):
    """The logged loss does not depend on how a batch is accumulated, and evaluation sees logits and labels only."""
    labels = torch.randint(0, 5, (4, 48, 48), generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": truth} for image, truth in zip(random_images(4), labels, strict=True)]
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.3)
    with torch.no_grad():
        expected = model(random_images(4), labels=labels).loss.item()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4 // accumulation, logging_steps=1, report_to=[],
        gradient_accumulation_steps=accumulation, use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    output = trainer.predict(data)
    assert output.predictions.shape == (4, 5, 48, 48)
    assert output.label_ids.shape == (4, 48, 48)
