"""The mmsegmentation recipe: names, settings read without running them, outputs of the original code."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.conversion import CheckpointError, CheckpointWarning, convert_checkpoint, engine
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.reading.python_config import parse_config
from ailurus_hf.conversion.reading.sources import read_tensors
from ailurus_hf.conversion.recipe import Pictures
from ailurus_hf.conversion.recipes import mmseg
from ailurus_hf.conversion.recipes.mmseg import HEADS as HEAD_CLASSES
from ailurus_hf.conversion.recipes.mmseg import mmseg_rules
from ailurus_hf.evaluation import segment_image, sliding_window_logits
from ailurus_hf.modeling.label_maps import class_names
from tests.conversion.mmseg_files import CLASSES, CONFIG, HEADS, PALETTE, Mmseg, write_mmseg
from tests.paths import golden

TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("PWNED"))


class TestLogits:
    @pytest.mark.parametrize("layout", ["0.x", "1.x"])
    @pytest.mark.parametrize("head", HEADS)
    @torch.no_grad()
    def test_against_a_model_of_torchs_layers(self, head: str, layout: str, tmp_path: Path) -> None:
        source = write_mmseg(tmp_path / "source", head, layout)
        report = convert_checkpoint("auto", tmp_path / "source", tmp_path / "out")
        assert report.recipe == "mmseg"
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert set(report.dropped) == {key for key in source.names() if key.startswith("auxiliary_head.")}
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        for size in ((32, 48), (48, 32), (37, 59), (16, 8)):  # neither square nor whole patches; and the same count
            images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
            assert (model(images).logits - source(images)).abs().max() <= TOLERANCE
            assert (model(images).logits.std(dim=(2, 3)) > 1e-3).all()
        model.config.keep_ratio = 0.3
        assert model(images).logits.shape == (2, 4, 16, 8)
        assert model.config.id2label == dict(enumerate(CLASSES))
        if head in ("naive", "pup"):
            assert {int(norm.num_batches_tracked) for norm in model.decode_head.batch_norms} == {1234}

    @pytest.mark.parametrize("width", [16, 40])
    @torch.no_grad()
    def test_a_mask_head_of_another_width(self, width: int, tmp_path: Path) -> None:
        """Narrower than the encoder's 24 channels, or wider."""
        source = write_mmseg(tmp_path / "source", "mask", head_width=width)
        report = convert_checkpoint("auto", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        assert (model.config.hidden_size, model.config.decode_head.hidden_size) == (24, width)
        images = torch.randn(2, 3, 37, 59)
        assert (model(images).logits - source(images)).abs().max() <= TOLERANCE

    @pytest.mark.parametrize("head", ["mask", "linear"])
    @torch.no_grad()
    def test_without_patch_bias_and_last_norm(self, head: str, tmp_path: Path) -> None:
        """The tensors tell, not the config."""
        source = write_mmseg(tmp_path / "source", head, plain=True)
        convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        assert (model.config.patch_bias, model.config.use_final_norm) == (False, False)
        images = torch.randn(1, 3, 40, 40)
        assert (model(images).logits - source(images)).abs().max() <= TOLERANCE

    @pytest.mark.parametrize(
        ("head", "wrong"),
        [
            ("mask", {"layer_norm_eps": 1e-1}),
            ("mask", {"decoder_layer_norm_eps": 1e-1}),
            ("mask", {"logits_resize": "crop"}),
            ("linear", {"position_interpolation": "bilinear"}),
            ("pup", {"decoder_layer_norm_eps": 1e-1}),
            ("pup", {"position_interpolation": "bicubic"}),
            ("pup", {"decoder_upscale": 3}),
        ],
    )
    def test_a_wrong_setting_is_caught(self, head: str, wrong: dict[str, Any], tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", head)
        with pytest.raises(CheckpointError, match="logits differ"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out", **wrong)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_and_new_settings(self, dtype: str, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "pup")
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "half", dtype=dtype)
        assert report.dtype == dtype
        convert_checkpoint("ailurus", tmp_path / "half", tmp_path / "out", keep_ratio=0.25)
        saved = load_file(tmp_path / "out" / "model.safetensors")
        assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}", "torch.int64"}


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

    @pytest.mark.parametrize("wrong", [{"layer_norm_eps": 1e-5}, {"decoder_layer_norm_eps": 1e-6}])
    def test_a_slightly_wrong_epsilon_is_caught(self, wrong: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="logits differ"):
            convert_checkpoint("mmseg", golden("mmseg", "segmenter_mask"), tmp_path / "out", **wrong)


class TestSettings:
    @pytest.mark.parametrize("layout", ["0.x", "1.x"])
    def test_config(self, layout: str, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "mask", layout)
        convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out", license="apache-2.0")
        config = AiluRusConfig.from_pretrained(tmp_path / "out")
        assert (config.layer_norm_eps, config.decoder_layer_norm_eps) == (1e-6, 1e-5)
        assert (config.decoder_num_attention_heads, config.decoder_num_layers) == (2, 2)
        assert (config.position_interpolation, config.position_resize_rule) == ("bicubic", "count")
        assert (config.window_size, config.window_stride, config.hidden_dropout_prob) == (32, 24, 0.1)
        assert config.id2label == dict(enumerate(CLASSES))
        assert [list(colour) for colour in config.palette] == PALETTE
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "apache-2.0"
        processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
        assert list(processor.image_mean) == pytest.approx([0.485, 0.456, 0.406])

    def test_bilinear_positions(self, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "mask", interpolate_mode="'bilinear'")
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert AiluRusConfig.from_pretrained(tmp_path / "out").position_interpolation == "bilinear"

    def test_windows_that_are_not_square(self, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "mask", crop_size="(32, 48)")
        with pytest.warns(CheckpointWarning, match=r"windows of crop_size=\(32, 48\), stride=\(24, 24\) are not kept"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert AiluRusConfig.from_pretrained(tmp_path / "out").window_size is None

    def test_a_classifier_that_the_mask_head_does_not_use(self, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "mask", tensors={"decode_head.conv_seg.bias": torch.zeros(2)})
        dropped = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out").dropped
        assert set(dropped) == {"auxiliary_head.0.conv_seg.weight", "decode_head.conv_seg.bias"}

    def test_names_and_colours_of_the_file(self, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "linear")
        content = read_tensors(tmp_path / "source" / "iter_2.pth", objects=True)
        content = {name: content[name] for name in ("meta", "state_dict")}
        content["meta"]["dataset_meta"] = {"classes": ("a", "", "c", "a")}
        torch.save(content, tmp_path / "source" / "iter_2.pth")
        with pytest.warns(CheckpointWarning) as caught:
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        said = [str(warning.message) for warning in caught]
        assert said == ["no name for class 1; set them with --labels", "several classes have the name a"]
        content["meta"]["dataset_meta"] = {"classes": CLASSES, "palette": [[0, 0, 300]] * 4}
        torch.save(content, tmp_path / "source" / "iter_2.pth")
        with pytest.raises(ValueError, match="palette must hold colours of three whole numbers from 0 to 255"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "other")

    def test_a_config_beside_the_checkpoint(self, tmp_path: Path) -> None:
        source = write_mmseg(tmp_path / "source", "linear")
        torch.save({"state_dict": source.names()}, tmp_path / "source" / "iter_2.pth")
        with pytest.raises(CheckpointError, match="no config in the checkpoint, no single"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        text = CONFIG.replace("HEAD", HEADS["linear"]).replace("MODE", "bicubic").replace("TEST", "None")
        (tmp_path / "source" / "linear.py").write_text(text)
        convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")


MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
OLD = {"data = dict(type='SegDataPreProcessor',": "img_norm_cfg = dict(", "data_preprocessor=data,": ""}
# what a config says of the order of the channels, and whether the model takes blue, green, red
ORDERS: dict[str, tuple[dict[str, str], bool]] = {
    "turned": ({}, False),
    "turned, by its other name": ({"bgr_to_rgb=True": "rgb_to_bgr=True"}, False),
    "as it is in files": ({"bgr_to_rgb=True": "bgr_to_rgb=False"}, True),
    "not told": ({", bgr_to_rgb=True": ""}, True),
    "0.x, turned": ({**OLD, "bgr_to_rgb=True": "to_rgb=True"}, False),
    "0.x, as it is in files": ({**OLD, "bgr_to_rgb=True": "to_rgb=False"}, True),
    "0.x, not told": ({**OLD, ", bgr_to_rgb=True": ""}, False),
}


class TestPictures:
    @pytest.mark.parametrize("order", ORDERS)
    @torch.no_grad()
    def test_from_a_picture_to_its_logits(self, order: str, tmp_path: Path) -> None:
        replaced, bgr = ORDERS[order]
        source = write_mmseg(tmp_path / "source", "linear", replaced=replaced)
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        assert "from a picture" in report.verification.against
        picture = torch.randint(0, 256, (3, 37, 59), dtype=torch.uint8)
        values = (picture.flip(0) if bgr else picture).float()
        expected = source(((values - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))[None])
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
        logits = model(processor(picture, return_tensors="pt")["pixel_values"]).logits
        assert (logits - expected).abs().max() <= TOLERANCE

    def test_recorded_outputs_are_of_the_source_order(self, tmp_path: Path) -> None:
        source = write_mmseg(tmp_path / "source", "linear", replaced=ORDERS["as it is in files"][0])
        pixel_values = torch.randn(1, 3, 32, 48)
        recorded = {"pixel_values": pixel_values, "logits": source(pixel_values)}
        save_file(recorded, tmp_path / "source" / "golden.safetensors")
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        assert "golden.safetensors" in report.verification.against

    @pytest.mark.parametrize("wrong", [{"bgr": False}, {"processor": {"image_mean": [0.5] * 3}}])
    def test_a_wrong_preprocessing_is_caught(
        self, wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(*arguments: Any) -> Pictures:
            return replace(right(*arguments), **wrong)

        right: Any = mmseg.read_pictures
        write_mmseg(tmp_path / "source", "linear", replaced=ORDERS["as it is in files"][0])
        monkeypatch.setattr(mmseg, "read_pictures", read)
        with pytest.raises(CheckpointError, match="the pixel values of a picture differ from the source's own"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_forgotten_kernel_is_caught(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "_picture_kernel", lambda model: "ailurus.embeddings.position_embeddings")
        write_mmseg(tmp_path / "source", "linear", replaced=ORDERS["as it is in files"][0])
        with pytest.raises(CheckpointError, match="the logits differ"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")

    def test_padding_is_said(self, tmp_path: Path) -> None:
        padded = {"bgr_to_rgb=True": "bgr_to_rgb=True, test_cfg=dict(size_divisor=32)"}
        write_mmseg(tmp_path / "source", "linear", replaced=padded)
        with pytest.warns(CheckpointWarning, match="test_cfg pads pictures before the model sees them"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")


class TestOneChannel:
    @staticmethod
    def write(folder: Path, head: str, channels: str, classes: tuple[str, ...] = ("dry", "flood")) -> Mmseg:
        """A head of one channel, on the layers of one with four."""
        width = 10 if head in ("naive", "pup") else 24
        tensors = {"decode_head.conv_seg.weight": torch.randn(1, width, 1, 1) * 0.3}
        tensors["decode_head.conv_seg.bias"] = torch.tensor([-0.4])
        # the auxiliary head has as many classes, so it is the head's that is replaced
        old = {"naive": "in_index=2, num_classes=4", "linear": "concat_input=False, num_classes=4"}[head]
        model = write_mmseg(folder, head, tensors=tensors, replaced={old: old.replace("num_classes=4", channels)})
        content = read_tensors(folder / "iter_2.pth", objects=True)
        content["meta"]["dataset_meta"] = {"classes": classes, "palette": [[1, 2, 3], [4, 5, 6]][-len(classes) :]}
        torch.save({name: content[name] for name in ("meta", "state_dict")}, folder / "iter_2.pth")
        model.decode_head.conv_seg = torch.nn.Conv2d(width, 1, 1)
        model.decode_head.conv_seg.weight.data, model.decode_head.conv_seg.bias.data = tensors.values()
        return model.eval()

    @pytest.mark.parametrize(
        ("channels", "classes", "threshold"),
        [
            ("num_classes=2, out_channels=1", ("dry", "flood"), 0.3),
            ("num_classes=2, out_channels=1, threshold=0.45", ("dry", "flood"), 0.45),
            ("num_classes=1", ("flood",), 0.3),
            ("num_classes=1, threshold=None, out_channels=None", ("flood",), 0.3),
        ],
    )
    @pytest.mark.parametrize("head", ["linear", "naive"])
    @torch.no_grad()
    def test_converts(
        self, head: str, channels: str, classes: tuple[str, ...], threshold: float, tmp_path: Path
    ) -> None:
        source = self.write(tmp_path / "source", head, channels, classes)
        report = convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out", keep_ratio=1.0).eval()
        processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
        assert class_names(model.config.id2label, model.config.num_labels) == ["background", "flood"]
        assert [list(colour) for colour in model.config.palette] == [[4, 5, 6]]
        assert (model.config.binary_threshold, processor.binary_threshold) == (threshold, threshold)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 59, 3), dtype=np.uint8))
        logits = source(processor(image, return_tensors="pt")["pixel_values"])
        expected = (logits[0, 0].sigmoid() > threshold).long()
        assert 0 < expected.float().mean() < 1
        found = segment_image(model, processor, image).labels
        clear = (logits[0, 0].sigmoid() - threshold).abs() > 1e-4
        assert np.array_equal(found[clear], expected[clear])
        (background, foreground) = pipeline("image-segmentation", model=str(tmp_path / "out"))(image)
        assert (background["label"], foreground["label"]) == ("background", "flood")

    def test_masks_of_two_classes_are_two_channels(self, tmp_path: Path) -> None:
        """Whatever `out_channels` says: the mask head has one for each class."""
        replaced = {"num_classes=4, num_layers": "num_classes=4, out_channels=1, num_layers"}
        write_mmseg(tmp_path / "source", "mask", replaced=replaced)
        convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert AiluRusConfig.from_pretrained(tmp_path / "out").num_labels == 4

    def test_names_that_the_user_gives(self, tmp_path: Path) -> None:
        self.write(tmp_path / "source", "linear", "num_classes=1")
        for number, names in enumerate(({"0": "water"}, {1: "water"}, {0: "land", 1: "water"})):
            settings = {"id2label": names, "binary_threshold": 0.7, "palette": [[0, 0, 0], [7, 8, 9]][-len(names) :]}
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / str(number), **settings)
            config = AiluRusConfig.from_pretrained(tmp_path / str(number))
            assert class_names(config.id2label, config.num_labels) == ["background", "water"]
            assert AiluRusImageProcessor.from_pretrained(tmp_path / str(number)).binary_threshold == 0.7
            assert [list(colour) for colour in config.palette] == [[7, 8, 9]]
        with pytest.raises(ValueError, match="id2label must name the classes 0 to 0"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out", id2label={0: "a", 1: "b", 2: "c"})


class TestKeys:
    @pytest.mark.parametrize("head", HEADS)
    def test_every_key_once_and_every_rule_at_least_once(self, head: str, tmp_path: Path) -> None:
        keys = write_mmseg(tmp_path / "source", head).names()
        decoder = next(decoder for name, decoder in HEAD_CLASSES.items() if name in HEADS[head])
        rules = mmseg_rules(decoder, "backbone.ln1.weight" in keys)
        check_rules_used(rules, map_keys(rules, keys))

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
        ("head", "changes", "said"),
        [
            (
                "mask",
                {"type='VisionTransformer'": "type='SwinTransformer'"},
                "backbone.type must be 'VisionTransformer', got 'Swin",
            ),
            ("mask", {"type='SegmenterMaskTransformerHead'": "type='SETRMLAHead'"}, "got 'SETRMLAHead'"),
            ("mask", {"with_cls_token=True": "with_cls_token=False"}, "with_cls_token must be True"),
            ("mask", {"with_cls_token=True": "out_origin=True"}, "out_origin must be False"),
            ("mask", {"out_indices=(0, 1, 2)": "out_indices=-2"}, "out_indices must name the last layer"),
            ("mask", {"MODE": "nearest"}, "interpolate_mode must be 'bicubic' or 'bilinear', got 'nearest'"),
            (
                "mask",
                {"num_classes=4, num_layers": "num_classes=7, num_layers"},
                r"wrong shape of decode_head\.cls_emb",
            ),
            ("mask", {"num_classes=4, num_layers": "num_classes='4', num_layers"}, "num_classes must be a whole"),
            ("mask", {"img_size=(32, 48)": "img_size=(32, 48, 8)"}, "img_size must be a number or"),
            (
                "mask",
                {"bgr_to_rgb=True": "bgr_to_rgb='no'"},
                "data_preprocessor.bgr_to_rgb must be true or false, got 'no'",
            ),
            ("mask", {"data_preprocessor=data,": "", "\ndata = ": "\nother = "}, "img_norm_cfg must tell mean and"),
            ("mask", {"drop_rate=0.1": "drop_rate=2"}, "drop_rate must be a number from 0 to below 1, got 2"),
            (
                "mask",
                {"mean=[123.675, 116.28, 103.53]": "mean=None"},
                "data_preprocessor.mean must be a list of 3 numbers, got None",
            ),
            ("mask", {"model = dict(": "model = build("}, r"no config with model = dict\(backbone=\.\.\.\)"),
            ("mask", {"decode_head=dict(": "decode_head=list("}, r"no config with model = dict\(backbone=\.\.\.\)"),
            ("mask", {"decode_head=dict": "other_head=dict"}, "model.decode_head must be a mapping, got None"),
            ("linear", {"num_convs=0": "num_convs=1"}, "decode_head.num_convs must be 0, got 1"),
            ("naive", {"in_index=2": "in_index=0"}, r"in_index must select the last .* \(0, 1, 2\), got 0"),
            ("naive", {"in_index=2": "in_index=(0, 2)"}, r"in_index must select the last layer"),
            ("naive", {"out_indices=(0, 1, 2)": "out_indices=(0, 1)"}, r"the last layer, 2, got \(0, 1\)"),
            ("naive", {"out_indices=(0, 1, 2)": "out_indices=(0, -1)"}, "out_indices must name the last layer"),
            ("naive", {"align_corners=False": "align_corners=True"}, "align_corners must be False"),
            ("naive", {"num_convs=1": "num_convs=2"}, r"missing 6 keys .*up_convs\.1\.0\.conv\.weight|unexpected"),
            (
                "mask",
                {"num_heads=2, embed_dims": "num_heads=5, embed_dims"},
                "multiple of its num_attention_heads=5, got 24",
            ),
            ("naive", {"num_convs=1": "num_convs=0"}, "num_convs must be a whole number above 0, got 0"),
            ("naive", {"up_scale=4": "up_scale=1.5"}, "up_scale must be a whole number above 0, got 1.5"),
            ("naive", {"kernel_size=1": "kernel_size=2"}, "kernel_size must be 1 or 3, got 2"),
            ("naive", {"channels=10, in_index=2": "channels=11, in_index=2"}, "wrong shape of decode_head"),
            ("naive", {"dropout_ratio=0": "act_cfg=dict(type='GELU')"}, "act_cfg.type must be 'ReLU', got 'GELU'"),
            ("naive", {"dropout_ratio=0": "norm_layer=dict(type='BN')"}, "norm_layer.type must be 'LN', got 'BN'"),
            ("naive", {"SyncBN', requires_grad=True": "SyncBN', eps=1e-3"}, "norm_cfg.eps must be 1e-05, got 0.001"),
        ],
    )
    def test_configs(self, head: str, changes: dict[str, str], said: str, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", head, replaced=changes)
        with pytest.raises(CheckpointError, match=said) as caught:
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_values_that_refer_to_each_other_without_end(self, tmp_path: Path) -> None:
        """An error that prints them would take years."""
        bomb = "a0 = [1, 1]\n" + "".join(f"a{i} = [a{i - 1}, a{i - 1}]\n" for i in range(1, 40))
        write_mmseg(tmp_path / "source", "mask", replaced={"backbone_norm_cfg = ": bomb + "backbone_norm_cfg = "})
        with pytest.raises(CheckpointError, match="holds more than 100000 values"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")

    def test_a_convolution_that_is_no_matrix(self, tmp_path: Path) -> None:
        write_mmseg(tmp_path / "source", "linear", tensors={"decode_head.conv_seg.weight": torch.zeros(4, 24, 3, 3)})
        with pytest.raises(CheckpointError, match="must be a 1 x 1 convolution"):
            convert_checkpoint("mmseg", tmp_path / "source", tmp_path / "out")
