"""`auto`: what a source is recognised by; and the recipe that rewrites an AiluRus checkpoint's settings."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import ailurus_hf
from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.cli.app import main
from ailurus_hf.cli.convert import convert
from ailurus_hf.cli.loading import load_model
from ailurus_hf.conversion import CheckpointError, convert_checkpoint
from ailurus_hf.conversion.detection import recognise
from ailurus_hf.conversion.recipe import Evidence
from ailurus_hf.conversion.recipes import RECIPES
from ailurus_hf.conversion.recipes.timm_style import BLOCK
from ailurus_hf.registry import ARCHITECTURES
from tests.conversion.mmseg_files import write_mmseg
from tests.conversion.segformer_files import ORIGINS, write_segformer
from tests.conversion.segmenter_files import segmenter_variant, write_segmenter
from tests.conversion.vit_files import HEADS, vit_tensors, write_timm
from tests.factories import tiny_model, tiny_segformer
from tests.paths import ROOT, golden

OWN = [
    (model_type, name) for model_type in ("ailurus", "ailurus_segformer") for name in ARCHITECTURES[model_type].models
]


def write_source(folder: Path, format: str) -> Path:
    """A tiny source of a format; the file or folder that a user would name."""
    folder.mkdir()
    if format == "ailurus":
        tiny_model(AiluRusForSemanticSegmentation).save_pretrained(folder)
    elif format == "transformers":
        ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
    elif format == "timm":
        write_timm(folder, vit_tensors())
    else:
        mask = vit_tensors("cls_token mask_token norm qkv_bias ls")
        teacher = vit_tensors(prefix="module.backbone.") | {"module.head.last_layer.weight_g": torch.ones(2, 1)}
        decoder = {"decoder_pos_embed": torch.ones(1, 2, 3), "decoder_blocks.0.norm1.bias": torch.ones(3)}
        content = {
            "dino": {"student": teacher, "teacher": teacher, "args": Namespace(arch="x")},
            "dinov2": mask,
            "dinov2 of training": {"teacher": {f"backbone.{name}": tensor for name, tensor in mask.items()}},
            "mae": {"model": vit_tensors() | decoder, "args": Namespace(arch="x")},
            "bare": vit_tensors(),
            "in an entry": {"model": vit_tensors("cls_token norm qkv_bias head")},
        }[format]
        torch.save(content, folder / "x.pth")
        return folder / "x.pth"
    return folder


KNOWN = ("ailurus", "transformers", "timm", "dino", "dinov2", "dinov2 of training", "mae")
RECORDED = [
    ("segmenter", "segmenter/linear_vit"),
    ("timm", "timm_vit/vit_cls"),
    ("dino", "dino/full_checkpoint"),
    ("dinov2", "dinov2/vit_mlp"),
    ("mae", "mae/pretrain_full/checkpoint-1.pth"),
    ("mmseg", "mmseg/segmenter_mask"),
    ("mmseg", "mmseg/segmenter_linear"),
    ("segformer", "mmseg/segformer"),
    ("segformer", "segformer_nvlabs/segformer"),
]


class TestRecognition:
    @pytest.mark.parametrize("format", KNOWN)
    def test_each_format(self, format: str, tmp_path: Path) -> None:
        source = write_source(tmp_path / "source", format)
        found, weights, reason = recognise(source)
        assert found == format.split()[0]
        assert weights.is_file()
        assert reason.startswith("it has ")

    @pytest.mark.parametrize("origin", ORIGINS)
    def test_segformers(self, origin: str, tmp_path: Path) -> None:
        write_segformer(tmp_path / "source", origin)
        for file in tmp_path.glob("source/*.json"):  # names alone are enough
            file.unlink()
        assert recognise(tmp_path / "source")[0] == "segformer"

    @pytest.mark.parametrize("kind", ["linear", "mask_transformer"])
    def test_segmenters(self, kind: str, tmp_path: Path) -> None:
        assert recognise(write_segmenter(tmp_path / "source", segmenter_variant(kind)))[0] == "segmenter"
        write_mmseg(tmp_path / "mmseg", kind.split("_")[0])
        assert recognise(tmp_path / "mmseg")[0] == "mmseg"

    @pytest.mark.parametrize(("recipe", "name"), RECORDED)
    def test_goldens(self, recipe: str, name: str) -> None:
        assert recognise(golden(*name.split("/")))[0] == recipe

    @pytest.mark.parametrize(
        ("format", "said"),
        [
            ("bare", "ambiguous: it has tensors named .* without settings, as sources for 'dino' and 'timm' do"),
            ("in an entry", "ambiguous: it has an entry 'model' .*, as sources for 'mae' and 'timm' do"),
        ],
    )
    def test_refusals(self, format: str, said: str, tmp_path: Path) -> None:
        source = write_source(tmp_path / "source", format)
        with pytest.raises(CheckpointError, match=said) as caught:
            recognise(source)
        assert "\n" not in str(caught.value)

    def test_a_family_that_is_not_ported_is_refused_whatever_else_it_resembles(self, tmp_path: Path) -> None:
        tensors = vit_tensors() | {"blocks.0.attn.relative_position_bias_table": torch.ones(2)}
        torch.save({"teacher": tensors | {"head.last_layer.weight_g": torch.ones(2, 1)}}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="is a BEiT with relative position bias model"):
            recognise(tmp_path / "x.pth")

    def test_every_recipe_has_a_certain_sign(self) -> None:
        assert all(any(sign.certain for sign in recipe.signs) for recipe in RECIPES.values())

    def test_what_was_looked_for_is_listed(self, tmp_path: Path) -> None:
        torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="is not recognised; looked for") as caught:
            recognise(tmp_path / "x.pth")
        for recipe in RECIPES:
            assert f"{recipe}: " in str(caught.value)

    def test_a_transformers_folder(self, tmp_path: Path) -> None:
        write_timm(tmp_path, {"embeddings.cls_token": torch.zeros(1)})
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "ijepa"}))
        assert recognise(tmp_path)[0] == "transformers"
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "swinv2"}))
        with pytest.raises(CheckpointError, match="Swin V2"):
            recognise(tmp_path)

    def test_names_decide_not_parts_of_names(self) -> None:
        assert Evidence({"blocks.0.attn.qkv.weight": (1,)}).has(BLOCK)
        assert not Evidence({"my.blocks.0.attn.qkv.weight": (1,)}).has(BLOCK)
        assert not Evidence({"blocks.0.attn.qkv.weight.old": (1,)}).has(BLOCK)

    def test_conversion_and_command_line(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_segmenter(tmp_path / "source", segmenter_variant())
        assert main(["convert", "auto", "source", "out"]) == 0
        out = capfd.readouterr().out
        assert "recognised segmenter: it has tensors named encoder.blocks.0" in out
        torch.save(vit_tensors(), tmp_path / "x.pth")
        assert main(["convert", "auto", "x.pth", "other"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "x.pth is ambiguous" in line
        assert not (tmp_path / "other").exists()


def test_help_and_documents_name_every_recipe() -> None:
    names = {*RECIPES, "auto"}
    argument = get_type_hints(convert, include_extras=True)["name"].__metadata__[0]
    assert set(re.findall(r"[a-z0-9]+", argument.help.removeprefix("Source: "))) - {"or"} == names
    parameters = (convert_checkpoint.__doc__ or "").split("source: the checkpoint")[0]
    assert set(re.findall(r'"(\w+)"', parameters)) == names
    cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "convert.md").read_text(), re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == names


class TestSet:
    def test_values_are_json_or_text(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save(vit_tensors(grid=(2, 5)), tmp_path / "x.pth")
        options = ["--set", f"num_attention_heads={HEADS}", "--set", "image_size=[16,40]", "--set", "unfold=copy"]
        assert main(["convert", "dino", "x.pth", "out", *options]) == 0
        config = AiluRusConfig.from_pretrained("out")
        assert (config.num_attention_heads, tuple(config.image_size), config.unfold) == (HEADS, (16, 40), "copy")
        printed = capfd.readouterr().out
        assert "from_pretrained('out')" in printed

    @pytest.mark.parametrize(
        ("assignment", "said"),
        [
            ("num_attention_heads", "--set must be key=value, got 'num_attention_heads'"),
            ("=3", "--set must be key=value"),
            ("num_heads=3", "unknown setting 'num_heads'"),
            ("num_attention_heads=three", "add --set num_attention_heads=N"),
            ("num_attention_heads=0", "add --set num_attention_heads=N"),
            ("num_attention_heads=5", "hidden_size must be a multiple"),
        ],
    )
    def test_mistakes(
        self,
        assignment: str,
        said: str,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save(vit_tensors(), tmp_path / "x.pth")
        options = [] if "num_attention" in assignment else ["--set", f"num_attention_heads={HEADS}"]
        assert main(["convert", "dino", "x.pth", "out", *options, "--set", assignment]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
        assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


class TestAilurus:
    @pytest.mark.parametrize(
        "name", ["AiluRusForSemanticSegmentation", "AiluRusForImageClassification", "AiluRusModel", "AiluRusBackbone"]
    )
    def test_only_the_settings_change(self, name: str, tmp_path: Path) -> None:
        model = tiny_model(getattr(ailurus_hf, name), layer_norm_eps=1e-3, palette=[[1, 2, 3]] * 5)
        model.save_pretrained(tmp_path / "in")
        AiluRusImageProcessor(image_mean=[0.1, 0.2, 0.3], do_resize=True).save_pretrained(tmp_path / "in")
        report = convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out", keep_ratio=0.25, unfold="copy")
        assert report.verification is not None
        assert report.verification.largest_difference <= 1e-6
        before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        expected = AiluRusConfig.from_pretrained(tmp_path / "in").to_dict() | {"keep_ratio": 0.25, "unfold": "copy"}
        assert AiluRusConfig.from_pretrained(tmp_path / "out").to_dict() == expected
        assert list(AiluRusImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.1, 0.2, 0.3]

    @pytest.mark.parametrize(
        "name", ["AiluRusSegformerForSemanticSegmentation", "AiluRusSegformerModel", "AiluRusSegformerBackbone"]
    )
    def test_hierarchical_models(self, name: str, tmp_path: Path) -> None:
        model = tiny_segformer(getattr(ailurus_hf, name))
        model.save_pretrained(tmp_path / "in")
        report = convert_checkpoint("auto", tmp_path / "in", tmp_path / "out", stage_keep_ratios=[1, 0.5, 0.5, 1])
        assert report.recipe == "ailurus"
        assert report.verification is not None
        assert report.verification.largest_difference <= 1e-5
        loaded = type(model).from_pretrained(tmp_path / "out")
        assert loaded.config.stage_ratios == (1, 0.5, 0.5, 1)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[key])

    @pytest.mark.parametrize("recipe", ["auto", "ailurus", "segformer", "transformers"])
    @pytest.mark.parametrize(("model_type", "name"), OWN)
    def test_nothing_changes_unasked(self, model_type: str, name: str, recipe: str, tmp_path: Path) -> None:
        """Under whatever name: our SegFormer has the tensor names of transformers'."""
        model_class = ARCHITECTURES[model_type].load(ARCHITECTURES[model_type].models[name])
        settings: dict[str, Any] = {"keep_ratio": 0.3, "unfold": "copy", "palette": [[1, 2, 3]] * 5, "window_size": 64}
        settings |= {"window_stride": 32, "semantic_loss_ignore_index": 77, "id2label": dict(enumerate("vwxyz"))}
        if model_type == "ailurus":
            model = tiny_model(model_class, **settings, decoder_type="mask_transformer", decoder_num_attention_heads=2)
        else:
            model = tiny_segformer(model_class, **settings, stage_keep_ratios=[1, 0.9, 0.5, 0.25], patch_norm_eps=1e-5)
        model.save_pretrained(tmp_path / "in")
        AiluRusImageProcessor(image_mean=[0.1, 0.2, 0.3], do_reduce_labels=True).save_pretrained(tmp_path / "in")
        report = convert_checkpoint(recipe, tmp_path / "in", tmp_path / "out")
        assert report.recipe == "ailurus"
        for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
            assert (tmp_path / "in" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file

    def test_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        tiny_model(AiluRusForSemanticSegmentation).save_pretrained("in")
        assert main(["convert", "auto", "in", "out", "--keep-ratio", "0.25", "--set", "tail_layers=1"]) == 0
        config = AiluRusConfig.from_pretrained("out")
        assert (config.keep_ratio, config.tail_layers, config.cluster_layer) == (0.25, 1, None)

    def test_refusals(self, tmp_path: Path) -> None:
        tiny_model(AiluRusForSemanticSegmentation).save_pretrained(tmp_path / "in")
        with pytest.raises(CheckpointError, match="wrong shape"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out", intermediate_size=32)
        config = tmp_path / "in" / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"architectures": ["Other"]}))
        with pytest.raises(CheckpointError, match="architectures must name one of"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
        for names in ([1], "AiluRusModel", 5, [["AiluRusModel"]], [None]):
            config.write_text(json.dumps(settings | {"architectures": names}))
            with pytest.raises(CheckpointError, match="architectures must be a list of class names"):
                convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
            with pytest.raises(CheckpointError, match="architectures must be a list of class names"):
                load_model(tmp_path / "in")
        for change in ({"num_hidden_layers": 10**9}, {"decode_head": {"num_layers": 10**9}}):
            config.write_text(json.dumps(settings | change))
            with pytest.raises(
                CheckpointError, match="the settings give the model 1000000000 layers, but there are 72"
            ):
                convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
        config.write_text(json.dumps(settings | {"model_type": "vit"}))
        with pytest.raises(CheckpointError, match="'ailurus_segformer' or 'lookupvit', got 'vit'"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
