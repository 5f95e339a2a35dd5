"""The Segmenter recipe: names, settings, logits of the original code, and what is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.conversion import CheckpointError, CheckpointWarning, convert_checkpoint, engine
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.recipes import segmenter
from ailurus_hf.conversion.rules import Drop
from ailurus_hf.utils.files import atomic_directory
from tests.conversion.segmenter_files import (
    REFERENCE,
    segmenter_shapes,
    segmenter_tensors,
    segmenter_variant,
    write_segmenter,
)
from tests.paths import golden, shared

KINDS = [(decoder, distilled) for decoder in ("linear", "mask_transformer") for distilled in (False, True)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_segmenter(tmp_path / "source", segmenter_variant())


def converted(tmp_path: Path, variant: dict[str, Any], **settings: Any) -> AiluRusForSemanticSegmentation:
    write_segmenter(tmp_path / "source", variant)
    convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out", verify=False, **settings)
    return AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()


@torch.no_grad()
def dense_logits(model: AiluRusForSemanticSegmentation, pixel_values: torch.Tensor) -> torch.Tensor:
    model.config.keep_ratio = 1.0
    return model(pixel_values=pixel_values).logits


class TestKeys:
    """Names alone, so that a change of names in the models is seen without weights."""

    @pytest.mark.parametrize(("decoder", "distilled"), KINDS)
    def test_the_table_gives_exactly_the_names_of_the_model(self, decoder: str, distilled: bool) -> None:
        variant = segmenter_variant(decoder, distilled)
        rules = segmenter.segmenter_rules(decoder, distilled)
        mappings = map_keys(rules, segmenter_shapes(variant))
        check_rules_used(rules, mappings)
        config = AiluRusConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            use_distillation_token=distilled,
            decoder_type=decoder,
            decoder_num_layers=2,
        )
        with torch.device("meta"):
            names = set(AiluRusForSemanticSegmentation(config).state_dict())
        assert {target for mapping in mappings for target in mapping.targets} == names

    @pytest.mark.parametrize(
        ("source", "targets"),
        [
            ("encoder.cls_token", ["ailurus.embeddings.cls_token"]),
            ("encoder.dist_token", ["ailurus.embeddings.distillation_token"]),
            ("encoder.pos_embed", ["ailurus.embeddings.position_embeddings"]),
            ("encoder.patch_embed.proj.bias", ["ailurus.embeddings.patch_embeddings.projection.bias"]),
            ("encoder.blocks.10.norm1.weight", ["ailurus.layers.10.layernorm_before.weight"]),
            ("encoder.blocks.10.norm2.weight", ["ailurus.layers.10.layernorm_after.weight"]),
            (
                "encoder.blocks.0.attn.qkv.bias",
                [f"ailurus.layers.0.attention.{name}_proj.bias" for name in ("q", "k", "v")],
            ),
            ("encoder.blocks.0.attn.proj.weight", ["ailurus.layers.0.attention.o_proj.weight"]),
            ("encoder.blocks.3.mlp.fc1.weight", ["ailurus.layers.3.mlp.fc1.weight"]),
            ("encoder.blocks.3.mlp.fc2.bias", ["ailurus.layers.3.mlp.fc2.bias"]),
            ("encoder.norm.bias", ["ailurus.layernorm.bias"]),
            ("encoder.head.weight", []),
            ("encoder.head_dist.bias", []),
            ("decoder.cls_emb", ["decode_head.class_tokens"]),
            ("decoder.proj_dec.weight", ["decode_head.projection.weight"]),
            ("decoder.proj_patch", ["decode_head.patch_projection.weight"]),
            ("decoder.proj_classes", ["decode_head.class_projection.weight"]),
            ("decoder.blocks.1.norm1.bias", ["decode_head.layers.1.layernorm_before.bias"]),
            ("decoder.decoder_norm.weight", ["decode_head.layernorm.weight"]),
            ("decoder.mask_norm.weight", ["decode_head.mask_norm.weight"]),
        ],
    )
    def test_names_one_by_one(self, source: str, targets: list[str]) -> None:
        (mapping,) = map_keys(segmenter.segmenter_rules("mask_transformer", True), [source])
        assert list(mapping.targets) == targets

    def test_linear_head(self) -> None:
        (mapping,) = map_keys(segmenter.segmenter_rules("linear", False), ["decoder.head.weight"])
        assert mapping.targets == ("decode_head.classifier.weight",)


class TestLogits:
    @pytest.mark.parametrize("name", ["segmenter/linear_vit", "segmenter/mask_vit", "safety/valid_control"])
    def test_golden(self, name: str, tmp_path: Path) -> None:
        folder = golden(*name.split("/"))
        report = convert_checkpoint("segmenter", folder, tmp_path / "out")
        expected = load_file(folder / "golden.safetensors")
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
        assert (dense_logits(model, expected["pixel_values"]) - expected["logits"]).abs().max() <= 3e-5
        assert report.verification is not None
        assert report.verification.largest_difference <= 3e-5
        assert "golden.safetensors" in report.verification.against

    @pytest.mark.parametrize("name", ["segmenter/linear_vit", "segmenter/mask_vit"])
    def test_the_reference_is_the_original(self, name: str) -> None:
        folder = golden(*name.split("/"))
        expected = load_file(folder / "golden.safetensors")
        checkpoint = segmenter.read_segmenter(segmenter.RECIPE.find(folder))
        reference = segmenter.plan_segmenter(checkpoint).reference
        assert reference is not None
        logits = reference(checkpoint.tensors, expected["pixel_values"])
        assert (logits - expected["logits"]).abs().max() <= 1e-5

    @pytest.mark.parametrize("size", [(24, 32), (32, 24), (16, 48), (40, 40), (17, 51), (8, 8), (96, 33)])
    @pytest.mark.parametrize(("decoder", "distilled"), KINDS)
    def test_every_kind_at_every_shape(
        self, decoder: str, distilled: bool, size: tuple[int, int], tmp_path: Path
    ) -> None:
        """The trained grid is 3 x 4. 32 x 24 and 16 x 48 have as many patches in another shape: not resized."""
        variant = segmenter_variant(decoder, distilled)
        model = converted(tmp_path, variant)
        pixel_values = torch.randn(2, 3, *size)
        expected = REFERENCE(segmenter_tensors(variant), pixel_values)
        assert expected.shape == (2, 5, *size)
        assert (dense_logits(model, pixel_values) - expected).abs().max() <= 3e-5

    @pytest.mark.parametrize("frame", ["0016E5_07959", "0016E5_08009", "0016E5_08059", "0016E5_08109"])
    def test_trained_checkpoint_on_photographs(self, frame: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        expected = load_file(shared("segmenter-camvid", "golden.safetensors"))[f"logits_{frame}"]
        image = Image.open(shared("camvid", "val", "images", f"{frame}.jpg"))
        out = tmp_path_factory.getbasetemp() / "camvid-ailurus"
        if not out.exists():
            convert_checkpoint("segmenter", shared("segmenter-camvid"), out)
        model = AiluRusForSemanticSegmentation.from_pretrained(out).eval()
        inputs = AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 360, 480)  # im_size is 360: the frames keep their size
        logits = dense_logits(model, inputs["pixel_values"])[:, :, ::4, ::4]
        assert (logits - expected).abs().max() <= 1e-4

    def test_camvid_golden_is_complete(self) -> None:
        """All recorded frames are among those tested above."""
        names = {name.removeprefix("logits_") for name in load_file(shared("segmenter-camvid", "golden.safetensors"))}
        assert names == {"0016E5_07959", "0016E5_08009", "0016E5_08059", "0016E5_08109"}


class TestSettings:
    def test_config(self, tmp_path: Path) -> None:
        config = converted(tmp_path, segmenter_variant("mask_transformer", True)).config
        expected = {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "image_size": (24, 32),
            "patch_size": 8,
            "drop_path_rate": 0.1,
            "use_distillation_token": True,
            "position_interpolation": "bilinear",
            "position_antialias": False,
            "position_resize_rule": "count",
            "decoder_type": "mask_transformer",
            "decoder_num_layers": 2,
            "decoder_num_attention_heads": 1,
            "decoder_intermediate_size": 256,
            "decoder_dropout_prob": 0.1,
            "window_size": 32,
            "window_stride": 24,
            "num_labels": 5,
            "grouping": "region_merging",
            "cluster_layer": None,
            "keep_ratio": 0.5,
        }
        found = {name: getattr(config, name) for name in expected}
        assert {**found, "image_size": tuple(found["image_size"])} == expected
        assert config.id2label == {index: f"LABEL_{index}" for index in range(5)}

    def test_decoder_heads_do_not_follow_the_encoder(self, tmp_path: Path) -> None:
        """128 channels: 2 decoder heads, where the encoder has 4."""
        variant = segmenter_variant("mask_transformer", width=128)
        assert converted(tmp_path, variant).config.decoder_num_attention_heads == 2

    @pytest.mark.parametrize(
        ("layers", "grouping", "cluster_layer"),
        [
            (1, "region_merging", 0),
            (2, "region_merging", None),
            (1, "density_peaks", 0),
            (2, "density_peaks", 1),
            (3, "density_peaks", None),
        ],
    )
    def test_default_cluster_layer_fits_shallow_models(
        self, layers: int, grouping: str, cluster_layer: int | None, tmp_path: Path
    ) -> None:
        variant = segmenter_variant()
        variant["net_kwargs"]["n_layers"] = layers
        assert converted(tmp_path, variant, grouping=grouping).config.cluster_layer == cluster_layer

    def test_users_settings_win(self, tmp_path: Path) -> None:
        names = {"0": "sky", "1": "road", "2": "car", "3": "tree", "4": "sign"}
        model = converted(
            tmp_path, segmenter_variant(), keep_ratio=0.25, cluster_layer=1, unfold="copy", id2label=names
        )
        assert (model.config.keep_ratio, model.config.cluster_layer, model.config.unfold) == (0.25, 1, "copy")
        assert model.config.id2label == {int(index): name for index, name in names.items()}
        assert model.config.label2id["car"] == 2

    def test_tail_layers_lower_the_default_cluster_layer(self, tmp_path: Path) -> None:
        assert converted(tmp_path, segmenter_variant(), tail_layers=2).config.cluster_layer == 0

    @pytest.mark.parametrize(
        ("distilled", "mean", "std"),
        [(False, [0.5] * 3, [0.5] * 3), (True, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])],
    )
    def test_image_processor(self, distilled: bool, mean: list[float], std: list[float], tmp_path: Path) -> None:
        converted(tmp_path, segmenter_variant(distilled=distilled))
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        assert isinstance(processor, AiluRusImageProcessor)
        assert (list(processor.image_mean), list(processor.image_std)) == (mean, std)
        assert processor.do_resize
        assert processor.size["shortest_edge"] == 48
        inputs = processor(Image.new("RGB", (200, 100)), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 48, 96)

    @pytest.mark.parametrize(
        ("drop", "size"), [((), 48), (("inference_kwargs",), 40), (("inference_kwargs", "dataset_kwargs"), 24)]
    )
    def test_processor_size_without_some_sections(self, drop: tuple[str, ...], size: int, tmp_path: Path) -> None:
        variant = {name: section for name, section in segmenter_variant().items() if name not in drop}
        model = converted(tmp_path, variant)
        assert AiluRusImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == size
        assert (model.config.window_size is None) == ("inference_kwargs" in drop)

    def test_distilled_may_be_absent(self, tmp_path: Path) -> None:
        variant = segmenter_variant()
        tensors = segmenter_tensors(variant)
        del variant["net_kwargs"]["distilled"]  # as in the official vit_large_* entries
        write_segmenter(tmp_path / "source", variant, tensors)
        convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")
        assert not AiluRusConfig.from_pretrained(tmp_path / "out").use_distillation_token

    def test_unused_classifier_may_be_absent(self, tmp_path: Path) -> None:
        variant = segmenter_variant()
        tensors = {name: tensor for name, tensor in segmenter_tensors(variant).items() if "encoder.head" not in name}
        write_segmenter(tmp_path / "source", variant, tensors)
        assert convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out").dropped == {}

    def test_normalizations_that_disagree_are_noted(self, tmp_path: Path) -> None:
        variant = segmenter_variant()
        variant["dataset_kwargs"]["normalization"] = "deit"
        write_segmenter(tmp_path / "source", variant)
        with pytest.warns(CheckpointWarning, match="'deit' is used"):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")
        processor = AiluRusImageProcessor.from_pretrained(tmp_path / "out")
        assert list(processor.image_mean) == [0.485, 0.456, 0.406]


class TestOutput:
    def test_report(self, source: Path, tmp_path: Path) -> None:
        steps: list[str] = []
        report = convert_checkpoint("segmenter", source, tmp_path / "out", progress=steps.append)
        state = load_file(tmp_path / "out" / "model.safetensors")
        assert report.written
        assert report.source == source / "checkpoint.pth"
        assert report.output == tmp_path / "out"
        assert report.num_tensors == len(state)
        assert report.num_parameters == sum(tensor.numel() for tensor in state.values())
        assert set(report.dropped) == {"encoder.head.weight", "encoder.head.bias"}
        assert all("unused" in reason for reason in report.dropped.values())
        assert {row.source for row in report.key_table} == set(segmenter_shapes(segmenter_variant()))
        (row,) = [row for row in report.key_table if row.source == "encoder.blocks.0.attn.qkv.weight"]
        assert (row.shape, row.rule, len(row.targets)) == ((192, 64), "SplitRows", 3)
        assert json.loads(json.dumps(report.to_dict()))["sha256"] == report.sha256
        assert [step.split()[0].rstrip(":") for step in steps] == ["reading", "mapping", "writing", "verifying"]

    def test_folder(self, source: Path, tmp_path: Path) -> None:
        report = convert_checkpoint("segmenter", source, tmp_path / "out", license="mit")
        names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.license == "mit"
        for text in ("2311.01197", "Strudel", "checkpoint.pth", report.sha256, "from_pretrained"):
            assert text in card.content

    def test_auto_classes_and_pipeline(self, source: Path, tmp_path: Path) -> None:
        convert_checkpoint("segmenter", source, tmp_path / "out")
        assert isinstance(
            AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out"), AiluRusForSemanticSegmentation
        )
        result = pipeline("image-segmentation", model=str(tmp_path / "out"))(Image.new("RGB", (64, 48), "teal"))
        assert result[0]["mask"].size == (64, 48)

    def test_half_precision_is_kept(self, tmp_path: Path) -> None:
        variant = segmenter_variant()
        tensors = {name: tensor.half() for name, tensor in segmenter_tensors(variant).items()}
        report = convert_checkpoint(
            "segmenter", write_segmenter(tmp_path / "source", variant, tensors), tmp_path / "out"
        )
        assert report.dtype == "float16"
        state = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float16}
        assert torch.equal(state["ailurus.embeddings.cls_token"], tensors["encoder.cls_token"])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
    def test_dtype(self, dtype: Any, source: Path, tmp_path: Path) -> None:
        report = convert_checkpoint("segmenter", source, tmp_path / "out", dtype=dtype)
        assert report.verification is not None  # compared on the rounded weights
        assert report.verification.largest_difference < 1e-4
        (found,) = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
        assert str(found).removeprefix("torch.") == report.dtype == str(dtype).removeprefix("torch.")

    def test_shards(self, source: Path, tmp_path: Path) -> None:
        convert_checkpoint("segmenter", source, tmp_path / "out", max_shard_size="200KB")
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
        assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
        model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "out")
        expected = segmenter_tensors(segmenter_variant())["decoder.head.weight"]
        assert torch.equal(model.state_dict()["decode_head.classifier.weight"], expected)

    def test_two_conversions_give_the_same_bytes(self, source: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            convert_checkpoint("segmenter", source, tmp_path / name)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()

    def test_dry_run_writes_nothing(self, source: Path, tmp_path: Path) -> None:
        report = convert_checkpoint("segmenter", source, tmp_path / "deep" / "out", dry_run=True)
        assert not report.written
        assert report.key_table
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_sources(self, source: Path, tmp_path: Path) -> None:
        """The file, a file of another name, and weights re-saved as safetensors."""
        from safetensors.torch import save_file

        convert_checkpoint("segmenter", source / "checkpoint.pth", tmp_path / "a")
        (source / "checkpoint.pth").rename(source / "best.pth")
        convert_checkpoint("segmenter", source, tmp_path / "b")
        (source / "best.pth").unlink()
        save_file(segmenter_tensors(segmenter_variant()), source / "model.safetensors")
        convert_checkpoint("segmenter", source, tmp_path / "c")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
        assert weights[0] == weights[1] == weights[2]

    def test_overwrite_replaces_a_checkpoint(self, source: Path, tmp_path: Path) -> None:
        convert_checkpoint("segmenter", source, tmp_path / "out", max_shard_size="200KB")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            convert_checkpoint("segmenter", source, tmp_path / "out")
        convert_checkpoint("segmenter", source, tmp_path / "out", overwrite=True)
        assert not list((tmp_path / "out").glob("model-*"))
        assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}

    def test_overwrite_does_not_delete_other_folders(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "documents").mkdir()
        (tmp_path / "documents" / "thesis.txt").touch()
        with pytest.raises(FileExistsError, match="not replaced"):
            convert_checkpoint("segmenter", source, tmp_path / "documents", overwrite=True)
        (source / "config.json").touch()
        for output in (source, tmp_path):
            with pytest.raises((ValueError, FileExistsError)):
                convert_checkpoint("segmenter", source, output, overwrite=True)
        assert (source / "checkpoint.pth").is_file()
        assert (tmp_path / "documents" / "thesis.txt").is_file()


class TestVerification:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"layer_norm_eps": 1e-2},
            {"position_interpolation": "bicubic"},
            {"num_attention_heads": 8},
            {"decoder_num_attention_heads": 2},
            {"hidden_act": "relu"},
        ],
    )
    def test_a_wrong_setting_is_caught(self, wrong: dict[str, Any], tmp_path: Path) -> None:
        write_segmenter(tmp_path / "source", segmenter_variant("mask_transformer"))
        with pytest.raises(CheckpointError, match="logits differ"):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out", **wrong)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        report = convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out", verify=False, **wrong)
        assert report.verification is None

    def test_recorded_logits_are_compared(self, source: Path, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        recorded = {"pixel_values": torch.randn(1, 3, 24, 32), "logits": torch.zeros(1, 5, 24, 32)}
        save_file(recorded, source / "golden.safetensors")
        with pytest.raises(CheckpointError, match=r"golden\.safetensors"):
            convert_checkpoint("segmenter", source, tmp_path / "out")

    def test_settings_of_the_method_do_not_disturb_it(self, source: Path, tmp_path: Path) -> None:
        report = convert_checkpoint("segmenter", source, tmp_path / "out", num_clusters=1, cluster_layer=0)
        assert report.verification is not None
        assert report.verification.largest_difference < 3e-5
        assert AiluRusConfig.from_pretrained(tmp_path / "out").num_clusters == 1


class TestRefusals:
    """Each is an error that names what is wrong, and nothing is written."""

    @pytest.fixture(autouse=True)
    def _nothing_written(self, tmp_path: Path) -> Any:
        yield
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "other"}

    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"keep_ratio": 0}, ValueError, "keep_ratio"),
            ({"keep_ratio": -0.5}, ValueError, "keep_ratio"),
            ({"keep_ratio": 1.5}, ValueError, "keep_ratio"),
            ({"keep_ratio": float("nan")}, ValueError, "keep_ratio"),
            ({"num_clusters": 0}, ValueError, "num_clusters"),
            ({"num_clusters": 2.5}, ValueError, "num_clusters"),
            ({"cluster_layer": -1}, ValueError, "cluster_layer"),
            ({"cluster_layer": 3}, ValueError, "cluster_layer"),
            ({"keep_ration": 0.5}, TypeError, "did you mean 'keep_ratio'"),
            ({"zzz": 0.5}, TypeError, "unknown setting 'zzz'"),
            ({"dtype": "int8"}, ValueError, "float32"),
            ({"max_shard_size": "large"}, ValueError, "5GB"),
            ({"max_shard_size": 0}, ValueError, "5GB"),
            ({"id2label": {"0": "sky"}}, ValueError, "0 to 4"),
            ({"id2label": dict.fromkeys("abcde", "x")}, ValueError, "id2label"),
            ({"id2label": ["sky"]}, ValueError, "id2label"),
            ({"id2label": dict(enumerate(["a", "", "c", " ", "e"]))}, ValueError, "got none for 1, 3"),
            ({"palette": [[0, 0, 300]] * 5}, ValueError, r"whole numbers from 0 to 255, got \[0, 0, 300\]"),
            ({"palette": [[0, 0, -1]] * 5}, ValueError, "whole numbers from 0 to 255"),
            ({"palette": [[0, 0]] * 5}, ValueError, "whole numbers from 0 to 255"),
            ({"palette": [[0, 0, 1]] * 4}, ValueError, "a colour for each of the num_labels=5 classes"),
            ({"num_hidden_layers": 10**9}, CheckpointError, "1000000000 layers, but there are 46 tensors"),
            ({"num_labels": 10**9}, CheckpointError, "num_labels must be at most 1000000"),
            ({"hidden_size": 32}, CheckpointError, "wrong shape"),
        ],
    )
    def test_arguments(
        self, arguments: dict[str, Any], error: type[Exception], said: str, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=said) as caught:
            convert_checkpoint("segmenter", source, tmp_path / "out", **arguments)
        assert "\n" not in str(caught.value)

    def test_unknown_recipe(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="'auto', got 'segmentr'"):
            convert_checkpoint("segmentr", source, tmp_path / "out")

    def test_missing_files(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            convert_checkpoint("segmenter", tmp_path / "nowhere", tmp_path / "out")
        (source / "variant.yml").rename(source / "settings.yml")
        with pytest.raises(FileNotFoundError, match=r"variant\.yml"):
            convert_checkpoint("segmenter", source, tmp_path / "out")
        (source / "checkpoint.pth").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds settings\.yml"):
            convert_checkpoint("segmenter", source, tmp_path / "out")

    @pytest.mark.parametrize(
        ("path", "value", "said"),
        [
            (("net_kwargs",), None, "net_kwargs must be a mapping"),
            (("net_kwargs", "decoder"), "linear", "decoder must be a mapping"),
            (("net_kwargs", "decoder", "name"), "deeplab_dec", "'linear' or 'mask_transformer', got 'deeplab_dec'"),
            (("net_kwargs", "d_model"), None, "d_model must be a whole number"),
            (("net_kwargs", "d_model"), "64", "d_model must be a whole number"),
            (("net_kwargs", "d_model"), 64.0, "d_model must be a whole number"),
            (("net_kwargs", "n_heads"), 0, "n_heads"),
            (("net_kwargs", "n_heads"), 5, "num_attention_heads"),
            (("net_kwargs", "n_heads"), True, "n_heads"),
            (("net_kwargs", "n_cls"), -1, "n_cls"),
            (("net_kwargs", "n_cls"), 1, "n_cls must be at least 2, got 1"),
            (("net_kwargs", "n_layers"), 10**9, "1000000000 layers, but there are 46 tensors"),
            (("net_kwargs", "n_layers"), 2, "unexpected 12 keys"),
            (("net_kwargs", "distilled"), "yes", "distilled"),
            (("net_kwargs", "distilled"), True, "dist_token"),
            (("net_kwargs", "dropout"), float("nan"), "dropout"),
            (("net_kwargs", "patch_size"), (8, 8), "patch_size"),
            (("net_kwargs", "patch_size"), 4, "wrong shape of encoder.pos_embed"),
            (("net_kwargs", "image_size"), (25, 32), "multiples of patch_size=8"),
            (("net_kwargs", "image_size"), (8, 8, 8), "image_size"),
            (("net_kwargs", "image_size"), None, "image_size"),
            (("net_kwargs", "image_size"), (16, 16), "pos_embed"),
            (("dataset_kwargs", "normalization"), "imagenet", "'vit' or 'deit'"),
            (("inference_kwargs", "window_size"), "big", "window_size"),
            (("inference_kwargs", "im_size"), 0, "im_size"),
        ],
    )
    def test_variants(self, path: tuple[str, ...], value: Any, said: str, tmp_path: Path) -> None:
        variant = segmenter_variant()
        tensors = segmenter_tensors(variant)
        section = variant
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
        write_segmenter(tmp_path / "source", variant, tensors)
        with pytest.raises(ValueError, match=said):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")

    def test_mask_decoder_needs_64_channels(self, tmp_path: Path) -> None:
        write_segmenter(tmp_path / "source", segmenter_variant("mask_transformer", width=32))
        with pytest.raises(CheckpointError, match="at least 64"):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")

    @pytest.mark.parametrize(
        ("decoder", "said"),
        [("linear", "unknown to this recipe: decoder.cls_emb"), ("mask_transformer", "decoder.head")],
    )
    def test_decoder_of_the_other_kind(self, decoder: str, said: str, tmp_path: Path) -> None:
        other = "linear" if decoder == "mask_transformer" else "mask_transformer"
        variant, tensors = segmenter_variant(decoder), segmenter_tensors(segmenter_variant(other))
        variant["net_kwargs"]["decoder"].setdefault("n_layers", 2)
        tensors |= {f"decoder.blocks.{layer}.norm1.weight": torch.ones(64) for layer in range(2)}
        write_segmenter(tmp_path / "source", variant, tensors)
        with pytest.raises(CheckpointError, match=said):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")

    @pytest.mark.parametrize("name", sorted(segmenter_shapes(segmenter_variant("mask_transformer", True))))
    def test_each_tensor_is_needed(self, name: str) -> None:
        """Without a file: each key missing in turn is named, unless the model has no use for it."""
        variant = segmenter_variant("mask_transformer", True)
        tensors = {key: torch.empty(shape, device="meta") for key, shape in segmenter_shapes(variant).items()}
        del tensors[name]
        checkpoint = segmenter.SourceCheckpoint(Path("x.pth"), tensors, variant)
        plan = segmenter.plan_segmenter(checkpoint)
        skeleton = engine._build_skeleton(plan, {}, len(tensors))
        mappings = map_keys(plan.rules, tensors)
        if name.startswith("encoder.head"):
            engine._convert_tensors(plan, checkpoint, mappings, skeleton, None)
            return
        with pytest.raises(CheckpointError, match="missing") as caught:
            engine._convert_tensors(plan, checkpoint, mappings, skeleton, None)
        assert name in str(caught.value)

    def test_each_rule_is_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write_segmenter(tmp_path / "source", segmenter_variant("mask_transformer", True))
        rules = segmenter.segmenter_rules("mask_transformer", True)
        for missing in rules:
            fewer = tuple(rule for rule in rules if rule is not missing)
            monkeypatch.setattr(segmenter, "segmenter_rules", lambda decoder, distilled, fewer=fewer: fewer)
            with pytest.raises(CheckpointError, match="unknown to this recipe"):
                convert_checkpoint("segmenter", source, tmp_path / "out")

    def test_idle_rule(self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rules = (*segmenter.segmenter_rules("linear", False), Drop("encoder.mask_token", "unused"))
        monkeypatch.setattr(segmenter, "segmenter_rules", lambda decoder, distilled: rules)
        with pytest.raises(CheckpointError, match=r"no tensor matches encoder\.mask_token"):
            convert_checkpoint("segmenter", source, tmp_path / "out")

    def test_qkv_that_does_not_split(self, tmp_path: Path) -> None:
        variant = segmenter_variant()
        tensors = segmenter_tensors(variant) | {"encoder.blocks.1.attn.qkv.bias": torch.zeros(191)}
        write_segmenter(tmp_path / "source", variant, tensors)
        with pytest.raises(CheckpointError, match=r"encoder\.blocks\.1\.attn\.qkv\.bias .* 3 equal parts"):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")

    def test_vector_where_a_matrix_belongs(self, tmp_path: Path) -> None:
        variant = segmenter_variant("mask_transformer")
        tensors = segmenter_tensors(variant) | {"decoder.proj_patch": torch.zeros(64)}
        write_segmenter(tmp_path / "source", variant, tensors)
        with pytest.raises(CheckpointError, match=r"decoder\.proj_patch must be a matrix"):
            convert_checkpoint("segmenter", tmp_path / "source", tmp_path / "out")


def test_weights_that_are_not_finite_are_a_warning(tmp_path: Path) -> None:
    variant = segmenter_variant()
    tensors = segmenter_tensors(variant)
    tensors["encoder.blocks.0.attn.qkv.bias"][100] = float("inf")
    source = write_segmenter(tmp_path / "source", variant, copy.deepcopy(tensors))
    with pytest.warns(CheckpointWarning, match=r"encoder\.blocks\.0\.attn\.qkv\.bias"):
        report = convert_checkpoint("segmenter", source, tmp_path / "out")
    assert report.verification is None
    assert len(report.warnings) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"id2label": dict(enumerate("abcab"))}, "several classes have the name a, b"),
        ({"semantic_loss_ignore_index": 0}, "label 0 is left out of the loss, although it is the class 'LABEL_0'"),
        ({"semantic_loss_ignore_index": 4}, "label 4 is left out of the loss"),
    ],
)
def test_what_may_be_meant_is_a_warning(settings: dict[str, Any], said: str, source: Path, tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match=said):
        convert_checkpoint("segmenter", source, tmp_path / "out", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint("segmenter", source, tmp_path / "fine", semantic_loss_ignore_index=5)


def test_values_too_large_for_the_chosen_dtype_are_a_warning(tmp_path: Path) -> None:
    variant = segmenter_variant()
    tensors = segmenter_tensors(variant)
    tensors["decoder.head.bias"][0] = 1e6
    source = write_segmenter(tmp_path / "source", variant, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_checkpoint("segmenter", source, tmp_path / "out")
    with pytest.warns(CheckpointWarning, match=r"decoder\.head\.bias"):
        convert_checkpoint("segmenter", source, tmp_path / "half", dtype="float16")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), RuntimeError("bug")])
@pytest.mark.parametrize("step", ["weights", "processor", "card", "verify"])
def test_interruption_leaves_nothing(
    step: str, error: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    target, name = {
        "weights": (AiluRusForSemanticSegmentation, "save_pretrained"),
        "processor": (AiluRusImageProcessor, "save_pretrained"),
        "card": (ModelCard, "save"),
        "verify": (engine, "verify_checkpoint"),
    }[step]
    monkeypatch.setattr(target, name, stop)
    with pytest.raises((KeyboardInterrupt, OSError, RuntimeError)):
        convert_checkpoint("segmenter", source, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interruption_while_replacing_keeps_the_old_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "config.json").write_text('{"model_type": "ailurus"}')

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "verify_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint("segmenter", source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "ailurus"}'
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
