"""The mmsegmentation recipe: names, settings read without running them, outputs of the original code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.conversion import CheckpointError, convert_checkpoint
from ailurus_hf.conversion.engine import map_keys
from ailurus_hf.conversion.mmseg import mmseg_rules
from ailurus_hf.conversion.mmseg_config import parse_config
from ailurus_hf.evaluation import sliding_window_logits
from tests.paths import golden

TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("PWNED"))


def changed_copy(name: str, changes: dict[str, str], folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A golden checkpoint with its config's text changed, and tensors replaced or (None) left out."""
    source = golden("mmseg", "segmenter_mask", "segmenter_toy.pth")
    content = torch.load(source, weights_only=True)
    for old, new in changes.items():
        assert old in content["meta"]["config"]
        content["meta"]["config"] = content["meta"]["config"].replace(old, new)
    state = content["state_dict"] | {key: tensor for key, tensor in tensors.items() if tensor is not None}
    content["state_dict"] = {
        key: tensor for key, tensor in state.items() if key not in tensors or tensors[key] is not None
    }
    folder.mkdir()
    torch.save(content, folder / name)
    return folder


class TestGoldens:
    @pytest.mark.parametrize("name", ["segmenter_mask", "segmenter_linear"])
    def test_logits(self, name: str, tmp_path: Path) -> None:
        folder = golden("mmseg", name)
        report = convert_checkpoint("mmseg", folder, tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        expected = load_file(folder / "golden.safetensors")
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        for case in ("", "resized_"):  # 50 x 85 pixels: neither square nor whole patches
            if f"{case}logits" in expected:
                with torch.no_grad():
                    found = model(expected[f"{case}pixel_values"]).logits
                assert (found - expected[f"{case}logits"]).abs().max() <= TOLERANCE

    def test_sliding_windows_and_preprocessing(self, tmp_path: Path) -> None:
        folder = golden("mmseg", "segmenter_mask")
        convert_checkpoint("mmseg", folder, tmp_path / "out")
        expected = load_file(folder / "golden.safetensors")
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        assert (model.config.window_size, model.config.window_stride) == (64, 48)
        with torch.no_grad():
            found = sliding_window_logits(model, expected["slide_pixel_values"], window_size=64, window_stride=48)
        assert (found - expected["slide_predict_logits"]).abs().max() <= TOLERANCE
        processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
        image = expected["raw_bgr_uint8_image"].flip(0)
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        assert (pixel_values - expected["preprocessed_pixel_values"]).abs().max() <= 1e-6

    @pytest.mark.parametrize(
        "wrong", [{"layer_norm_eps": 1e-5}, {"decoder_layer_norm_eps": 1e-6}, {"logits_resize": "crop"}]
    )
    def test_a_wrong_setting_is_caught(self, wrong: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="logits differ"):
            convert_checkpoint("mmseg", golden("mmseg", "segmenter_mask"), tmp_path / "out", **wrong)


class TestSettings:
    def test_config(self, tmp_path: Path) -> None:
        convert_checkpoint("mmseg", golden("mmseg", "segmenter_mask"), tmp_path / "out", license="apache-2.0")
        config = AiluRusConfig.from_pretrained(tmp_path / "out")
        assert (config.layer_norm_eps, config.decoder_layer_norm_eps) == (1e-6, 1e-5)
        assert (config.decoder_num_attention_heads, config.decoder_num_layers) == (2, 2)
        assert (config.position_interpolation, config.position_resize_rule) == ("bicubic", "count")
        assert config.id2label[5] == "pole"
        assert list(config.palette[0]) == [128, 64, 128]
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "apache-2.0"

    def test_labels_of_mmengine_checkpoints(self, tmp_path: Path) -> None:
        convert_checkpoint("mmseg", golden("mmseg", "segmenter_linear"), tmp_path / "out")
        assert AiluRusConfig.from_pretrained(tmp_path / "out").id2label[6] == "person"

    def test_bilinear_positions(self, tmp_path: Path) -> None:
        source = changed_copy("x.pth", {"mode='bicubic'": "mode='bilinear'"}, tmp_path / "source")
        report = convert_checkpoint("mmseg", source, tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert AiluRusConfig.from_pretrained(tmp_path / "out").position_interpolation == "bilinear"

    def test_the_tensors_tell_of_biases_and_norms(self, tmp_path: Path) -> None:
        absent = dict.fromkeys(("backbone.patch_embed.projection.bias", "backbone.ln1.weight"))
        source = changed_copy("x.pth", {}, tmp_path / "source", **absent, **{"backbone.ln1.bias": None})
        report = convert_checkpoint("mmseg", source, tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        config = AiluRusConfig.from_pretrained(tmp_path / "out")
        assert (config.patch_bias, config.use_final_norm) == (False, False)

    def test_heads_used_in_training_are_dropped(self, tmp_path: Path) -> None:
        extra = {"auxiliary_head.0.conv_seg.weight": torch.zeros(2, 2), "decode_head.conv_seg.bias": torch.zeros(2)}
        source = changed_copy("x.pth", {}, tmp_path / "source", **extra)
        assert set(convert_checkpoint("mmseg", source, tmp_path / "out").dropped) == set(extra)


class TestKeys:
    @pytest.mark.parametrize(
        ("source", "targets"),
        [
            ("backbone.layers.11.ln1.weight", ["ailurus.layers.11.layernorm_before.weight"]),
            ("backbone.ln1.weight", ["ailurus.layernorm.weight"]),
            (
                "backbone.layers.0.attn.attn.in_proj_weight",
                [f"ailurus.layers.0.attention.{name}_proj.weight" for name in "qkv"],
            ),
            ("backbone.layers.0.attn.attn.out_proj.bias", ["ailurus.layers.0.attention.o_proj.bias"]),
            ("backbone.layers.0.ffn.layers.0.0.weight", ["ailurus.layers.0.mlp.fc1.weight"]),
            ("backbone.layers.0.ffn.layers.1.bias", ["ailurus.layers.0.mlp.fc2.bias"]),
            ("decode_head.cls_emb", ["decode_head.class_tokens"]),
            ("decode_head.classes_proj.weight", ["decode_head.class_projection.weight"]),
            ("decode_head.layers.1.ln2.bias", ["decode_head.layers.1.layernorm_after.bias"]),
            ("decode_head.conv_seg.weight", []),
        ],
    )
    def test_mask_transformer(self, source: str, targets: list[str]) -> None:
        (mapping,) = map_keys(mmseg_rules("mask_transformer", True), [source])
        assert list(mapping.targets) == targets

    def test_linear(self) -> None:
        (mapping,) = map_keys(mmseg_rules("linear", True), ["decode_head.conv_seg.weight"])
        assert mapping.targets == ("decode_head.classifier.weight",)


class TestConfigs:
    def test_literals_and_names_are_read(self) -> None:
        text = "a = dict(x=1, y=[2, -3.5])\nb = {'a': a, 'c': (None, True)}\nb2 = b\n"
        assert parse_config(text, "x.py")["b2"] == {"a": {"x": 1, "y": [2, -3.5]}, "c": (None, True)}

    @pytest.mark.parametrize(
        "line",
        [
            "a = __import__('os').mkdir('PWNED')",
            "import os; os.mkdir('PWNED'); a = os.mkdir",
            "a = [open('PWNED', 'w') for _ in range(1)]",
            "a = dict(**{'x': open('PWNED', 'w')})",
            'a = f\'{open("PWNED", "w")}\'',
            "a = dict(x=open('PWNED', 'w'))",
            "class A:\n    open('PWNED', 'w')",
        ],
    )
    def test_nothing_is_run_and_what_needs_it_has_no_value(self, line: str) -> None:
        assert parse_config(f"a = 1\n{line}\nb = 2\n", "x.py").get("b") == 2
        assert parse_config(f"{line}\n", "x.py") == {}

    @pytest.mark.parametrize("text", ["model = (", "x" * 1_000_001, "\x00", "(" * 5000])
    def test_unreadable(self, text: str) -> None:
        with pytest.raises(CheckpointError, match=r"x\.py"):
            parse_config(text, "x.py")


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"type='VisionTransformer'": "type='SwinTransformer'"}, "got 'SwinTransformer'; .*apply_ailurus"),
            ({"type='SegmenterMaskTransformerHead'": "type='SETRUPHead'"}, "got 'SETRUPHead'"),
            ({"type='SegmenterMaskTransformerHead'": "type='UPerHead'"}, "got 'UPerHead'"),
            ({"with_cls_token=True": "with_cls_token=False"}, "with_cls_token must be True"),
            ({"final_norm=True": "final_norm=True, out_indices=(0, 1)"}, "out_indices must name the last layer"),
            ({"mode='bicubic'": "mode='nearest'"}, "interpolate_mode must be one of"),
            ({"num_classes=6": "num_classes=7"}, r"wrong shape of decode_head\.cls_emb"),
            ({"num_classes=6": "num_classes='6'"}, "num_classes must be a whole number"),
            ({"img_size=(64, 64)": "img_size=(64, 64, 64)"}, "img_size must be a number or"),
            ({"mean=[127.5, 127.5, 127.5]": "mean=None"}, "mean and std written out"),
            ({"model = dict(": "model = build("}, r"no config with model = dict\(backbone=\.\.\.\)"),
        ],
    )
    def test_configs(self, changes: dict[str, str], said: str, tmp_path: Path) -> None:
        source = changed_copy("x.pth", changes, tmp_path / "source")
        with pytest.raises(CheckpointError, match=said) as caught:
            convert_checkpoint("mmseg", source, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_config_that_runs_code_is_not_run(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError):
            convert_checkpoint("mmseg", golden("safety", "malicious_mmseg_config"), tmp_path / "out")

    def test_a_convolution_that_is_no_matrix(self, tmp_path: Path) -> None:
        content = {
            "state_dict": torch.load(golden("mmseg", "segmenter_mask", "segmenter_toy.pth"), weights_only=True)[
                "state_dict"
            ]
        }
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.startswith("decode_head")}
        content["state_dict"] |= {
            "decode_head.conv_seg.weight": torch.zeros(7, 48, 3, 3),
            "decode_head.conv_seg.bias": torch.zeros(7),
        }
        (tmp_path / "source").mkdir()
        torch.save(content, tmp_path / "source" / "x.pth")
        config = golden("mmseg", "segmenter_linear", "segmenter_linear.py").read_text().replace("(48, 48)", "(64, 64)")
        (tmp_path / "source" / "config.py").write_text(config)
        with pytest.raises(CheckpointError, match="must be a 1 x 1 convolution"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
