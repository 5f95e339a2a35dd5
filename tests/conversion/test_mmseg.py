"""The mmsegmentation recipe: names, settings read without running them, outputs of the original code."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.conversion import CheckpointError, convert_checkpoint
from ailurus_hf.conversion.engine import map_keys
from ailurus_hf.conversion.reading.python_config import parse_config
from ailurus_hf.conversion.recipes.mmseg import mmseg_rules
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


SETR_CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
data = dict(type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data,
    backbone=dict(
        type='VisionTransformer', img_size=(32, 48), patch_size=8, embed_dims=24, num_layers=3, num_heads=3,
        out_indices=(0, 1, 2), drop_rate=0.1, norm_cfg=dict(type='LN', eps=1e-6), with_cls_token=True,
        interpolate_mode='bilinear'),
    decode_head=dict(
        type='SETRUPHead', in_channels=24, channels=10, in_index=2, num_classes=4, dropout_ratio=0, norm_cfg=norm_cfg,
        num_convs=NUM, up_scale=SCALE, kernel_size=KERNEL, align_corners=False),
    auxiliary_head=[dict(type='SETRUPHead', in_channels=24, channels=10, in_index=0, num_classes=4)],
    test_cfg=dict(mode='whole'))
"""
SETR_HEADS = {"naive": (1, 4, 1), "pup": (4, 2, 3)}


class Setr(nn.Module):
    """SETR made of torch's own layers, with mmsegmentation's names but for those inside a transformer layer."""

    NAMES: ClassVar = {
        "self_attn.": "attn.attn.", "linear1.": "ffn.layers.0.0.", "linear2.": "ffn.layers.1.", "norm1.": "ln1.",
        "norm2.": "ln2.",
    }  # fmt: skip

    def __init__(self, num_convs: int, up_scale: int, kernel_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        self.backbone.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.backbone.pos_embed = nn.Parameter(torch.randn(1, 1 + 4 * 6, 24))
        self.backbone.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, 24, 8, 8)})
        self.backbone.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.decode_head.norm = nn.LayerNorm(24, eps=1e-6)
        self.decode_head.up_convs = nn.ModuleList()
        for width in [24] + [10] * (num_convs - 1):
            conv = nn.Conv2d(width, 10, kernel_size, padding="same", bias=False)
            block = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(10), activate=nn.ReLU()))
            self.decode_head.up_convs.append(nn.Sequential(block, nn.UpsamplingBilinear2d(scale_factor=up_scale)))
            self.decode_head.up_convs[-1][1].align_corners = False
        self.decode_head.conv_seg = nn.Conv2d(10, 4, 1)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name.endswith("num_batches_tracked"):
                    tensor.fill_(1234)
                elif tensor.ndim == 1:
                    tensor.add_(torch.rand_like(tensor) * 0.5)

    def names(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for key, tensor in self.state_dict().items():
            for old, new in self.NAMES.items():
                key = key.replace(old, new) if key.startswith("backbone.") else key
            tensors[key] = tensor
        auxiliary = {f"auxiliary_head.0.{key}": value for key, value in self.decode_head.state_dict().items()}
        return tensors | auxiliary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        maps = self.backbone.patch_embed["projection"](nn.functional.pad(images, (0, -width % 8, 0, -height % 8)))
        grid, positions = maps.shape[-2:], self.backbone.pos_embed
        if grid.numel() != 24:
            old = positions[:, 1:].view(1, 4, 6, 24).permute(0, 3, 1, 2)
            new = nn.functional.interpolate(old, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
            positions = torch.cat([positions[:, :1], new], dim=1)
        tokens = torch.cat([self.backbone.cls_token.expand(len(images), -1, -1), maps.flatten(2).mT], dim=1) + positions
        for layer in self.backbone.layers:
            tokens = layer(tokens)
        maps = self.decode_head.norm(tokens[:, 1:]).mT.unflatten(2, grid)
        for step in self.decode_head.up_convs:
            maps = step(maps)
        return nn.functional.interpolate(self.decode_head.conv_seg(maps), size=(height, width), mode="bilinear")


def write_setr(folder: Path, head: str, layout: str = "1.x", **changes: str) -> Setr:
    """Write a SETR checkpoint; `changes` replaces `key=value` texts of its config by the values given."""
    text = SETR_CONFIG
    for name, value in zip(("NUM", "SCALE", "KERNEL"), SETR_HEADS[head], strict=True):
        text = text.replace(name, str(value))
    for key, value in changes.items():
        text, count = re.subn(rf"\b{key}=(\([^)]*\)|[^,()]+)", f"{key}={value}", text, count=1)
        assert count == 1
    model = Setr(*SETR_HEADS[head]).eval()
    names = ("a", "b", "c", "d")
    meta = {"config": text, "CLASSES": names} if layout == "0.x" else {"cfg": text, "dataset_meta": {"classes": names}}
    folder.mkdir()
    torch.save({"meta": meta, "state_dict": model.names()}, folder / "setr.pth")
    return model


class TestSetr:
    @pytest.mark.parametrize("layout", ["0.x", "1.x"])
    @pytest.mark.parametrize("head", SETR_HEADS)
    @torch.no_grad()
    def test_logits(self, head: str, layout: str, tmp_path: Path) -> None:
        source = write_setr(tmp_path / "source", head, layout)
        report = convert_checkpoint("auto", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= 1e-5
        assert set(report.dropped) == {key for key in source.names() if key.startswith("auxiliary_head.")}
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        for size in ((32, 48), (37, 59), (16, 8)):
            images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
            assert (model(images).logits - source(images)).abs().max() <= 1e-5
            assert (model(images).logits.std(dim=(2, 3)) > 1e-3).all()
        model.config.keep_ratio = 0.3
        assert model(images).logits.shape == (2, 4, 16, 8)
        assert model.config.id2label == dict(enumerate("abcd"))
        assert {int(norm.num_batches_tracked) for norm in model.decode_head.batch_norms} == {1234}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_and_new_settings(self, dtype: str, tmp_path: Path) -> None:
        write_setr(tmp_path / "source", "pup")
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "half", dtype=dtype)
        assert report.dtype == dtype
        convert_checkpoint("ailurus", tmp_path / "half", tmp_path / "out", keep_ratio=0.25)
        saved = load_file(tmp_path / "out" / "model.safetensors")
        assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}", "torch.int64"}

    @pytest.mark.parametrize(
        "wrong", [{"decoder_layer_norm_eps": 1e-1}, {"position_interpolation": "bicubic"}, {"decoder_upscale": 3}]
    )
    def test_a_wrong_setting_is_caught(self, wrong: dict[str, Any], tmp_path: Path) -> None:
        write_setr(tmp_path / "source", "pup")
        with pytest.raises(CheckpointError, match="logits differ"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out", **wrong)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"in_index": "0"}, r"in_index must select the last layer of out_indices \(0, 1, 2\), got 0"),
            ({"in_index": "(0, 2)"}, r"in_index must select the last layer"),
            ({"out_indices": "(0, 1)"}, r"out_indices must name the last layer, 2, got \(0, 1\)"),
            ({"out_indices": "(0, -1)"}, "out_indices must name the last layer"),
            ({"align_corners": "True"}, "align_corners must be False"),
            ({"num_convs": "2"}, r"missing 6 keys .*up_convs\.1\.0\.conv\.weight|unexpected"),
            ({"num_convs": "0"}, "num_convs must be a whole number above 0, got 0"),
            ({"up_scale": "1.5"}, "up_scale must be a whole number above 0, got 1.5"),
            ({"kernel_size": "2"}, "kernel_size must be 1 or 3, got 2"),
            ({"channels": "11"}, "wrong shape of decode_head"),
            ({"dropout_ratio": "0, act_cfg=dict(type='GELU')"}, "act_cfg must be ReLU"),
            ({"dropout_ratio": "0, norm_layer=dict(type='BN')"}, "norm_layer must be LN"),
            ({"requires_grad": "True, eps=1e-3"}, "norm_cfg must be BN or SyncBN with eps 1e-05"),
        ],
    )
    def test_refusals(self, changes: dict[str, str], said: str, tmp_path: Path) -> None:
        write_setr(tmp_path / "source", "naive", **changes)
        with pytest.raises(CheckpointError, match=said) as caught:
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


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
            (
                {"type='VisionTransformer'": "type='SwinTransformer'"},
                "got 'SwinTransformer'; other backbones are not converted",
            ),
            ({"type='SegmenterMaskTransformerHead'": "type='SETRMLAHead'"}, "got 'SETRMLAHead'"),
            ({"type='SegmenterMaskTransformerHead'": "type='UPerHead'"}, "got 'UPerHead'"),
            ({"with_cls_token=True": "with_cls_token=False"}, "with_cls_token must be True"),
            ({"final_norm=True": "final_norm=True, out_indices=(0,)"}, "out_indices must name the last layer"),
            ({"final_norm=True": "final_norm=True, out_indices=-2"}, "out_indices must name the last layer"),
            ({"final_norm=True": "final_norm=True, out_origin=True"}, "out_origin must be False"),
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
