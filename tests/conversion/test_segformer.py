"""The SegFormer recipe: three origins, told apart by names; goldens; safe reading; what is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessorPil, ViTImageProcessorPil

from ailurus_hf import AiluRusImageProcessor, AiluRusSegformerForSemanticSegmentation
from ailurus_hf.conversion import CheckpointError, CheckpointWarning, convert_checkpoint, engine
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.reading.sources import read_tensors
from ailurus_hf.conversion.recipe import SourceCheckpoint
from ailurus_hf.conversion.recipes import segformer
from ailurus_hf.modeling.label_maps import class_names
from tests.conversion.segformer_files import HEADS, ORIGINS, PICTURES, native, write_segformer
from tests.paths import golden

GOLDENS = {"nvlabs": ("segformer_nvlabs", "segformer"), "mmseg": ("mmseg", "segformer")}


def read(folder: Path) -> SourceCheckpoint:
    return segformer.RECIPE.read(segformer.RECIPE.find(folder))


@pytest.fixture
def native_folder(tmp_path: Path) -> Path:
    native(id2label={index: f"thing {index}" for index in range(5)}).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


@torch.no_grad()
@pytest.mark.parametrize("origin", GOLDENS)
def test_goldens(origin: str, tmp_path: Path) -> None:
    folder = golden(*GOLDENS[origin])
    report = convert_checkpoint("segformer", folder, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.largest_difference <= 1e-5
    expected = load_file(folder / "golden.safetensors")
    model = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1).eval()
    assert model.config.decoder_type == ("conv" if origin == "mmseg" else "linear")
    assert tuple(model.config.num_attention_heads) == HEADS
    for size in ("", "odd_"):
        if f"{size}pixel_values" not in expected:
            continue
        model.config.upsample_logits = True
        output = model(expected[f"{size}pixel_values"], output_hidden_states=True)
        model.config.upsample_logits = False
        quarter = model(expected[f"{size}pixel_values"]).logits
        found = {"logits": output.logits, "decode_head_logits": quarter}
        found |= {f"stage{i}_feature_map": feature_map for i, feature_map in enumerate(output.hidden_states, start=1)}
        for name, tensor in found.items():
            assert (tensor - expected[size + name]).abs().max() <= 3e-5, name


@torch.no_grad()
@pytest.mark.parametrize("origin", ORIGINS)
def test_every_origin(origin: str, tmp_path: Path) -> None:
    forward = write_segformer(tmp_path / "source", origin)
    report = convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")
    assert report.warnings == ()
    ours = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "out", keep_ratio=1, upsample_logits=False
    ).eval()
    assert type(ours) is AiluRusSegformerForSemanticSegmentation
    assert tuple(ours.config.num_attention_heads) == HEADS
    if origin in ("nvlabs", "mmseg"):
        assert ours.config.id2label == dict(enumerate("abcde"))
    for size in ((64, 64), (50, 75)):
        pixel_values = torch.randn(2, 3, *size)
        assert (ours(pixel_values).logits - forward(pixel_values)).abs().max() <= 1e-5


@torch.no_grad()
def test_stages_are_those_of_transformers(native_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint("segformer", native_folder, tmp_path / "out")
    ours = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1).eval()
    pixel_values = torch.randn(2, 3, 50, 75)
    pairs = [model(pixel_values, output_hidden_states=True).hidden_states for model in (ours, native())]
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


@pytest.mark.parametrize("origin", ORIGINS)
def test_every_key_once_and_every_rule_at_least_once(origin: str, tmp_path: Path) -> None:
    write_segformer(tmp_path / "source", origin)
    checkpoint = read(tmp_path / "source")
    assert segformer.ORIGINS[origin] in checkpoint.tensors
    mappings = map_keys(segformer.RULES[origin], checkpoint.tensors)
    check_rules_used(segformer.RULES[origin], mappings)
    targets = [target for mapping in mappings for target in mapping.targets]
    assert len(targets) == len(set(targets))


def test_settings(native_folder: Path, tmp_path: Path) -> None:
    preprocessing = {"size": {"height": 48, "width": 80}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}
    (native_folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    convert_checkpoint("segformer", native_folder, tmp_path / "out", stage_keep_ratios=[1, 0.5, 0.5, 1], unfold="copy")
    config = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert (config.layer_norm_eps, config.patch_norm_eps, config.cluster_layer) == (1e-5, None, 0)
    assert config.stage_ratios == (1, 0.5, 0.5, 1)
    assert (list(config.depths), list(config.sr_ratios)) == ([1, 2, 2, 1], [8, 4, 2, 1])
    assert config.id2label[3] == "thing 3"
    stored = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (stored["do_resize"], stored["size"], stored["image_mean"]) == (True, {"height": 48, "width": 80},
                                                                            [0.1, 0.2, 0.3])  # fmt: skip
    assert "tokens kept per stage: 1, 0.5, 0.5, 1" in (tmp_path / "out" / "README.md").read_text()


# settings of transformers' image processor
PREPROCESSING: dict[str, dict[str, Any]] = {
    "class alone": {"image_processor_type": "SegformerImageProcessor"},
    "old class": {"feature_extractor_type": "SegformerFeatureExtractor", "reduce_labels": True, "size": 48},
    "another class": {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 64}},
    "no normalisation": {"do_normalize": False, "size": 48},
    "no rescaling": {"do_rescale": False, "size": 48},
    "another factor": {"rescale_factor": 1 / 127.5, "size": 48},
    "bicubic": {"resample": 3, "size": {"height": 48, "width": 80}},
    "nearest": {"resample": 0, "size": 64},
    "shorter side": {"size": {"shortest_edge": 48}},
    "size as it is": {"do_resize": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "reduced labels": {"do_reduce_labels": True, "size": 48},
    "a middle that the class does not cut out": {"do_center_crop": True, "crop_size": 32, "size": 48},
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_pixel_values_are_the_native_ones(name: str, native_folder: Path, tmp_path: Path) -> None:
    stored = PREPROCESSING[name]
    (native_folder / "preprocessor_config.json").write_text(json.dumps(stored))
    report = convert_checkpoint("segformer", native_folder, tmp_path / "out")
    assert report.verification is not None
    assert "from a picture" in report.verification.against
    native_class = ViTImageProcessorPil if name == "another class" else SegformerImageProcessorPil
    known = {key: value for key, value in stored.items() if not key.endswith("_type")}
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    ours = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
    found, expected = (
        processor(picture, return_tensors="pt")["pixel_values"] for processor in (ours, native_class(**known))
    )
    assert torch.equal(found, expected)
    assert ours.do_reduce_labels == any("reduce_labels" in key for key in stored)


def test_invalid_preprocessing(native_folder: Path, tmp_path: Path) -> None:
    (native_folder / "preprocessor_config.json").write_text(json.dumps({"size": "large"}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is not valid"):
        convert_checkpoint("segformer", native_folder, tmp_path / "out")


def test_training_settings_come_along(tmp_path: Path) -> None:
    settings = {"drop_path_rate": 0.3, "classifier_dropout_prob": 0.2, "semantic_loss_ignore_index": 7}
    settings |= {"hidden_dropout_prob": 0.05, "strides": (4, 2, 2, 1)}
    native(**settings).save_pretrained(tmp_path / "native")
    convert_checkpoint("segformer", tmp_path / "native", tmp_path / "out")
    config = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert {**{name: getattr(config, name) for name in settings}, "strides": tuple(config.strides)} == settings


HEAD = "decode_head=dict(num_classes=5, dropout_ratio=0.2, ignore_index=99, align_corners=False)"
MODEL = f"""model = dict(
    backbone=dict(num_heads={list(HEADS)}, drop_path_rate=0.3), {HEAD},
    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(48, 48)))"""


@torch.no_grad()
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("origin", ["nvlabs", "mmseg"])
def test_settings_of_openmmlabs_configs(origin: str, turned: bool, tmp_path: Path) -> None:
    """Windows, dropout, what the loss leaves out, and the way from a picture to its logits."""
    pictures = PICTURES[origin].replace("True", str(turned))
    forward = write_segformer(tmp_path / "source", origin, f"{MODEL}\n{pictures}")
    report = convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")
    assert report.verification is not None
    assert "from a picture" in report.verification.against
    model = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1).eval()
    config = model.config
    assert (config.window_size, config.window_stride, config.drop_path_rate) == (64, 48, 0.3)
    assert (config.classifier_dropout_prob, config.semantic_loss_ignore_index) == (0.2, 99)
    processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.do_reduce_labels == (origin == "mmseg")
    picture = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    values = (picture if turned else picture.flip(0)).float()
    expected = forward(((values - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
    config.upsample_logits = False
    found = model(processor(picture, return_tensors="pt")["pixel_values"]).logits
    assert (found - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_one_channel(tmp_path: Path) -> None:
    """transformers' binary SegFormer; its own post-processing calls every pixel class 0."""
    source = native(num_labels=1, id2label={0: "flood"}, label2id={"flood": 0})
    source.save_pretrained(tmp_path / "native")
    report = convert_checkpoint("segformer", tmp_path / "native", tmp_path / "out")
    assert report.verification is not None
    model = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1).eval()
    assert class_names(model.config.id2label, model.config.num_labels) == ["background", "flood"]
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    labels[0, :7] = 255
    expected, found = (network(images, labels=labels) for network in (source, model))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = interpolate(expected.logits, size=(64, 64), mode="bilinear")[:, 0]
    maps = torch.stack(
        AiluRusImageProcessor.from_pretrained(tmp_path / "out").post_process_semantic_segmentation(found)
    )
    assert torch.equal(maps[logits.abs() > 1e-4], (logits > 0).long()[logits.abs() > 1e-4])
    assert 0 < maps.float().mean() < 1


def test_one_channel_of_mmsegmentation(tmp_path: Path) -> None:
    write_segformer(
        tmp_path / "source", "mmseg", MODEL.replace("num_classes=5", "num_classes=1") + "\n" + PICTURES["mmseg"]
    )
    content = read_tensors(tmp_path / "source" / "iter_1.pth", objects=True)
    content["state_dict"]["decode_head.conv_seg.weight"] = torch.randn(1, 24, 1, 1)
    content["state_dict"]["decode_head.conv_seg.bias"] = torch.randn(1)
    content["meta"]["dataset_meta"] = {"classes": ("dry", "flood")}
    torch.save({name: content[name] for name in ("meta", "state_dict")}, tmp_path / "source" / "iter_1.pth")
    convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")
    config = AiluRusSegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert (config.binary_threshold, class_names(config.id2label, config.num_labels)) == (0.3, ["background", "flood"])


@pytest.mark.parametrize("origin", ["nvlabs", "mmseg"])
def test_corners_that_are_aligned_are_refused(origin: str, tmp_path: Path) -> None:
    settings = MODEL.replace("align_corners=False", "align_corners=True") + "\n" + PICTURES[origin]
    write_segformer(tmp_path / "source", origin, settings)
    with pytest.raises(CheckpointError, match="align_corners must be False, got True"):
        convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("origin", ["nvlabs", "mmseg"])
def test_preprocessing_that_no_setting_tells_is_said(origin: str, tmp_path: Path) -> None:
    write_segformer(tmp_path / "source", origin, "")
    with pytest.warns(CheckpointWarning, match="no setting tells how pictures are prepared"):
        convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"layer_norm_eps": 1e-2}, {"num_attention_heads": [2, 2, 3, 4]}])
@pytest.mark.parametrize("origin", ["transformers", "nvlabs", "mmseg"])
def test_a_wrong_setting_is_caught(origin: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    write_segformer(tmp_path / "source", origin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_label_settings", lambda plan, settings: wrong)
        with pytest.raises(CheckpointError, match="the logits differ from the source's formulas"):
            convert_checkpoint("segformer", tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("origin", ORIGINS)
def test_eps_of_each_place(origin: str, tmp_path: Path) -> None:
    write_segformer(tmp_path / "source", origin)
    config = segformer.plan_segformer(read(tmp_path / "source")).config
    others = {config.get("patch_norm_eps"), config.get("reduction_norm_eps")}
    expected = 1e-5 if origin.startswith("transformers") else 1e-6
    assert (config["layer_norm_eps"], others) == (expected, {1e-5} if origin == "nvlabs" else {None})


def test_unknown_number_of_heads_is_said(native_folder: Path, tmp_path: Path) -> None:
    (native_folder / "config.json").unlink()
    with pytest.raises(ValueError, match="hidden_sizes must be multiples of num_attention_heads"):
        convert_checkpoint("segformer", native_folder, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint("segformer", native_folder, tmp_path / "out", num_attention_heads=list(HEADS))
    native(hidden_sizes=(16, 32, 80, 64), num_attention_heads=(1, 2, 5, 8)).save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "config.json").unlink()
    with pytest.warns(CheckpointWarning, match="those of all published models are used"):
        convert_checkpoint("segformer", tmp_path / "published", tmp_path / "out2")


def test_python_settings_are_parsed_not_run(tmp_path: Path) -> None:
    trap = (
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nmodel = dict(num_heads=[1, 2, 3, 4], x=dict(num_heads=f()))"
    )
    assert list(segformer._values_in_python(trap, "num_heads")) == [[1, 2, 3, 4]]
    assert list(segformer._values_in_python("{'num_heads': (2, 2)}", "num_heads")) == [(2, 2)]
    assert list(segformer._values_in_python("model = dict(", "num_heads")) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("recipe", "origin"),
    [("transformers", "transformers"), ("transformers", "transformers 4"), ("mmseg", "mmseg"), ("mmseg", "nvlabs")],
)
def test_reached_under_the_name_of_its_project(recipe: str, origin: str, tmp_path: Path) -> None:
    write_segformer(tmp_path / "source", origin)
    report = convert_checkpoint(recipe, tmp_path / "source", tmp_path / "out", dry_run=True)
    assert report.recipe == "segformer"
    assert report.recognised is None
    assert report.model_class == "AiluRusSegformerForSemanticSegmentation"


def test_other_recipes_point_here(native_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a SegFormer model: convert it with the recipe 'segformer'"):
        convert_checkpoint("timm", native_folder, tmp_path / "out")


def test_refuses_what_is_no_segformer(tmp_path: Path, native_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_checkpoint("segformer", tmp_path / "nowhere", tmp_path / "out")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="is no SegFormer of transformers, NVlabs or mmsegmentation"):
        convert_checkpoint("segformer", tmp_path / "other.pth", tmp_path / "out")
    tensors = load_file(native_folder / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("decode_head")}
    save_file(headless, native_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no SegFormer with four stages and a segmentation head"):
        convert_checkpoint("segformer", native_folder, tmp_path / "out")
    del tensors["segformer.encoder.block.2.1.mlp.dense1.weight"]
    save_file(tensors, native_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing key .*block\.2\.1\.mlp\.dense1\.weight"):
        convert_checkpoint("segformer", native_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
