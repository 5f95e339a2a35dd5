"""The SegFormer recipe: three origins, told apart by names; goldens; safe reading; what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation

from ailurus_hf import AiluRusSegformerForSemanticSegmentation
from ailurus_hf.conversion import CheckpointError, CheckpointWarning, convert_checkpoint
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.recipe import SourceCheckpoint
from ailurus_hf.conversion.recipes import segformer
from tests.conversion.segformer_files import HEADS, ORIGINS, native, write_segformer
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
