"""`auto`: what a source is recognised by; and the recipe that rewrites an AiluRus checkpoint's settings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ailurus_hf
from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.cli.app import main
from ailurus_hf.conversion import CheckpointError, convert_checkpoint
from ailurus_hf.conversion.detection import recognise
from ailurus_hf.conversion.recipe import Evidence
from ailurus_hf.conversion.recipes import RECIPES
from ailurus_hf.conversion.recipes.timm_style import BLOCK
from tests.conversion.segmenter_files import segmenter_variant, write_segmenter
from tests.conversion.vit_files import HEADS, vit_tensors, write_timm
from tests.factories import tiny_model
from tests.paths import golden

KNOWN = [
    ("segmenter", "segmenter/linear_vit"),
    ("segmenter", "segmenter/mask_vit"),
    ("timm", "timm_vit/vit_cls"),
    ("timm", "timm_vit/vit_cls_dynamic"),
    ("dino", "dino/full_checkpoint"),
    ("dinov2", "dinov2/vit_mlp"),
    ("mae", "mae/pretrain_full/checkpoint-1.pth"),
    ("mmseg", "mmseg/segmenter_mask"),
    ("mmseg", "mmseg/segmenter_linear"),
    ("segformer", "mmseg/segformer"),
    ("segformer", "segformer_nvlabs/segformer"),
]


class TestRecognition:
    @pytest.mark.parametrize(("recipe", "name"), KNOWN)
    def test_goldens(self, recipe: str, name: str) -> None:
        found, _, reason = recognise(golden(*name.split("/")))
        assert found == recipe
        assert reason.startswith("it has ")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("dino/backbone", "ambiguous: .*'dino' and 'timm'"),
            ("mae/finetune_cls", "ambiguous: .*'mae' and 'timm'"),
        ],
    )
    def test_refusals(self, name: str, said: str) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            recognise(golden(*name.split("/")))
        assert "\n" not in str(caught.value)

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

    def test_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        tiny_model(AiluRusForSemanticSegmentation).save_pretrained("in")
        assert main(["convert", "auto", "in", "out", "--keep-ratio", "0.25", "--set", "tail_layers=1"]) == 0
        config = AiluRusConfig.from_pretrained("out")
        assert (config.keep_ratio, config.tail_layers, config.cluster_layer) == (0.25, 1, 2)

    def test_refusals(self, tmp_path: Path) -> None:
        tiny_model(AiluRusForSemanticSegmentation).save_pretrained(tmp_path / "in")
        with pytest.raises(CheckpointError, match="wrong shape"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out", intermediate_size=32)
        config = tmp_path / "in" / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"architectures": ["Other"]}))
        with pytest.raises(CheckpointError, match="architectures must name one of"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
        config.write_text(json.dumps(settings | {"model_type": "vit"}))
        with pytest.raises(CheckpointError, match="model_type must be 'ailurus', got 'vit'"):
            convert_checkpoint("ailurus", tmp_path / "in", tmp_path / "out")
