"""The transformers recipe: names of transformers 4 and 5, settings, and parity with the native classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import ailurus_hf
from ailurus_hf.conversion import CheckpointError, convert_checkpoint
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.reading import sources
from ailurus_hf.conversion.recipes.transformers_vit import FAMILIES, transformers_rules

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "newt"}, "label2id": {"cat": 0, "dog": 1, "newt": 2}}
# class, its config; every class that the recipe knows, and the settings that change what they compute
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", {"intermediate_size": 48, "layer_norm_eps": 1e-3}),
    "vit no bias": ("ViTModel", {"intermediate_size": 48, "qkv_bias": False, "hidden_act": "quick_gelu"}),
    "vit classifier": ("ViTForImageClassification", {"intermediate_size": 48, **LABELS}),
    "vit masked": ("ViTForMaskedImageModeling", {"intermediate_size": 48, "encoder_stride": 8}),
    "vit wide": ("ViTModel", {"intermediate_size": 48, "image_size": [16, 40]}),
    "deit": ("DeiTModel", {"intermediate_size": 48}),
    "deit classifier": ("DeiTForImageClassification", {"intermediate_size": 48, **LABELS}),
    "deit distilled": ("DeiTForImageClassificationWithTeacher", {"intermediate_size": 48, **LABELS}),
    "mae": ("ViTMAEModel", {"intermediate_size": 48}),
    "mae with decoder": (
        "ViTMAEForPreTraining",
        {
            "intermediate_size": 48,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
    ),
    "ijepa": ("IJepaModel", {"intermediate_size": 48}),
    "ijepa classifier": ("IJepaForImageClassification", {"intermediate_size": 48, **LABELS}),
    "dinov2": ("Dinov2Model", {"mlp_ratio": 2}),
    "dinov2 swiglu": ("Dinov2Model", {"use_swiglu_ffn": True, "layerscale_value": 0.3}),
    "dinov2 classifier": ("Dinov2ForImageClassification", {"mlp_ratio": 2, **LABELS}),
    "registers": ("Dinov2WithRegistersModel", {"mlp_ratio": 2, "num_register_tokens": 3}),
    "registers swiglu": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True}),
    "registers classifier": ("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2, **LABELS}),
}
SIZES = [(32, 32), (48, 48), (24, 40)]


def native_model(name: str) -> Any:
    """A native model whose every tensor is random, so that each matters; seeded."""
    class_name, settings = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SHAPE, **settings})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.3 + centre)
    return model


def write_native(folder: Path, name: str, version: int) -> Any:
    """Save with the tensor names of transformers 4 or 5; return the model."""
    model = native_model(name)
    model.save_pretrained(folder, save_original_format=version == 4)
    return model


@torch.no_grad()
def native_output(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    config, arguments = model.config, {}
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
        patches = pixel_values.shape[-2] * pixel_values.shape[-1] // 64
        arguments["noise"] = torch.arange(patches).expand(len(pixel_values), -1)
    if "dinov2" not in config.model_type:
        arguments["interpolate_pos_encoding"] = pixel_values.shape[-2:] != (32, 32)
    base = getattr(model, model.base_model_prefix, model)
    output = (model if "ImageClassification" in type(model).__name__ else base)(pixel_values, **arguments)
    return output.logits if "logits" in output else output.last_hidden_state


class TestParity:
    @pytest.mark.parametrize("version", [4, 5])
    @pytest.mark.parametrize("name", MODELS)
    def test_against_the_native_class(self, name: str, version: int, tmp_path: Path) -> None:
        native = write_native(tmp_path / "source", name, version)
        report = convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= 1e-5
        classifies = "ImageClassification" in type(native).__name__
        model_class = ailurus_hf.AiluRusForImageClassification if classifies else ailurus_hf.AiluRusModel
        model = model_class.from_pretrained(tmp_path / "out", keep_ratio=1.0)
        for size in SIZES if name != "vit wide" else [(16, 40)]:
            pixel_values = torch.randn(2, 3, *size)
            if name == "vit wide":
                expected = native(pixel_values).last_hidden_state
            else:
                expected = native_output(native, pixel_values)
            with torch.no_grad():
                output = model(pixel_values)
            found = output.logits if classifies else output.last_hidden_state
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5

    def test_names_are_really_those_of_two_versions(self, tmp_path: Path) -> None:
        names = {}
        for version in (4, 5):
            write_native(tmp_path / str(version), "dinov2 swiglu", version)
            names[version] = set(load_file(tmp_path / str(version) / "model.safetensors"))
        assert "encoder.layer.0.mlp.weights_in.weight" in names[4]
        assert "encoder.layer.0.mlp.gate_proj.weight" in names[5]

    def test_half_precision(self, tmp_path: Path) -> None:
        native_model("vit").half().save_pretrained(tmp_path / "source")
        report = convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        assert report.dtype == "float16"
        assert report.verification is not None
        assert report.verification.largest_difference <= 1e-5


class TestKeys:
    """Names as strings, without weights: a release of transformers that renames keys is seen at once."""

    @pytest.mark.parametrize(
        ("family", "version", "prefix", "source", "target"),
        [
            ("vit", 4, "vit.", "vit.embeddings.cls_token", "embeddings.cls_token"),
            ("vit", 4, "vit.", "vit.embeddings.position_embeddings", "embeddings.position_embeddings"),
            (
                "vit",
                4,
                "",
                "embeddings.patch_embeddings.projection.bias",
                "embeddings.patch_embeddings.projection.bias",
            ),
            ("vit", 4, "", "encoder.layer.10.attention.attention.query.weight", "layers.10.attention.q_proj.weight"),
            ("vit", 4, "", "encoder.layer.10.attention.attention.key.bias", "layers.10.attention.k_proj.bias"),
            ("vit", 4, "", "encoder.layer.0.attention.attention.value.weight", "layers.0.attention.v_proj.weight"),
            ("vit", 4, "", "encoder.layer.0.attention.output.dense.weight", "layers.0.attention.o_proj.weight"),
            ("vit", 4, "", "encoder.layer.0.intermediate.dense.weight", "layers.0.mlp.fc1.weight"),
            ("vit", 4, "", "encoder.layer.0.output.dense.bias", "layers.0.mlp.fc2.bias"),
            ("vit", 4, "", "encoder.layer.0.layernorm_before.weight", "layers.0.layernorm_before.weight"),
            ("vit", 5, "", "layers.0.attention.q_proj.weight", "layers.0.attention.q_proj.weight"),
            ("vit", 5, "", "layers.0.attention.o_proj.bias", "layers.0.attention.o_proj.bias"),
            ("vit", 5, "", "layers.0.mlp.fc1.weight", "layers.0.mlp.fc1.weight"),
            ("vit", 5, "vit.", "vit.layernorm.weight", "layernorm.weight"),
            ("vit", 4, "", "pooler.dense.weight", None),
            ("vit", 4, "vit.", "vit.embeddings.mask_token", None),
            ("vit_mae", 4, "vit.", "decoder.decoder_layers.0.output.dense.bias", None),
            ("deit", 4, "deit.", "deit.embeddings.distillation_token", "embeddings.distillation_token"),
            ("dinov2", 4, "", "encoder.layer.1.norm1.weight", "layers.1.layernorm_before.weight"),
            ("dinov2", 5, "", "encoder.layer.1.attention.k_proj.weight", "layers.1.attention.k_proj.weight"),
            ("dinov2", 5, "", "encoder.layer.1.layer_scale2.lambda1", "layers.1.layer_scale2.lambda1"),
            ("dinov2_with_registers", 4, "", "embeddings.register_tokens", "embeddings.register_tokens"),
        ],
    )
    def test_one_by_one(self, family: str, version: int, prefix: str, source: str, target: str | None) -> None:
        rules = transformers_rules(FAMILIES[family], version, prefix, "", registers=True)
        (mapping,) = map_keys(rules, [source])
        assert mapping.targets == (() if target is None else (target,))

    def test_gated_mlp(self) -> None:
        rules = transformers_rules(FAMILIES["dinov2"], 4, "", "", gated=True)
        (mapping,) = map_keys(rules, ["encoder.layer.0.mlp.weights_in.bias"])
        assert mapping.targets == ("layers.0.mlp.gate_proj.bias", "layers.0.mlp.up_proj.bias")
        rules = transformers_rules(FAMILIES["dinov2"], 5, "", "", gated=True)
        (mapping,) = map_keys(rules, ["encoder.layer.0.mlp.up_proj.bias"])
        assert mapping.targets == ("layers.0.mlp.up_proj.bias",)

    @pytest.mark.parametrize("model_type", FAMILIES)
    def test_the_installed_native_class_has_these_names(self, model_type: str) -> None:
        family = FAMILIES[model_type]
        config = CONFIG_MAPPING[model_type](**{**SHAPE, "num_hidden_layers": 2})
        registers = model_type == "dinov2_with_registers"
        with torch.device("meta"):
            names = list(family.native_class()(config).state_dict())
        rules = transformers_rules(family, 5, "", "", registers=registers)
        check_rules_used(rules, map_keys(rules, names))


class TestSettings:
    def test_labels_and_preprocessing_come_along(self, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit classifier", 4)
        processor = {"size": 40, "crop_size": 32, "do_center_crop": True, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}
        (tmp_path / "source" / "preprocessor_config.json").write_text(
            json.dumps({**processor, "image_processor_type": "ViTFeatureExtractor", "do_resize": True})
        )
        convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        config = ailurus_hf.AiluRusConfig.from_pretrained(tmp_path / "out")
        assert config.id2label == LABELS["id2label"]
        assert config.layer_norm_eps == 1e-12
        loaded = AutoImageProcessor.from_pretrained(tmp_path / "out")
        assert dict(loaded.size) == {"height": 40, "width": 40}
        assert dict(loaded.crop_size) == {"height": 32, "width": 32}
        assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
        image = torch.zeros(3, 60, 50, dtype=torch.uint8)
        assert loaded(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

    def test_licence_of_the_source(self, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        (tmp_path / "source" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\nA model.\n")
        report = convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.license == "bsd-3-clause"
        assert report.sha256 in card.content
        convert_checkpoint("transformers", tmp_path / "source", tmp_path / "other", license="mit")
        assert ModelCard.load(tmp_path / "other" / "README.md").data.license == "mit"

    def test_shards_and_pickles(self, tmp_path: Path) -> None:
        model = write_native(tmp_path / "whole", "vit", 4)
        expected = convert_checkpoint("transformers", tmp_path / "whole", tmp_path / "a")
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        sharded = convert_checkpoint("transformers", tmp_path / "shards", tmp_path / "b")
        assert sharded.sha256 != expected.sha256
        tensors = load_file(tmp_path / "whole" / "model.safetensors")
        (tmp_path / "whole" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "whole" / "pytorch_model.bin")
        convert_checkpoint("transformers", tmp_path / "whole", tmp_path / "c")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
        assert weights[0] == weights[1] == weights[2]


class TestHub:
    def test_a_name_is_downloaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Offline: the download is a stand-in that shows what would be asked for."""
        monkeypatch.chdir(tmp_path)
        write_native(tmp_path / "cache", "vit", 4)
        tensors = load_file(tmp_path / "cache" / "model.safetensors")
        (tmp_path / "cache" / "model.safetensors").unlink()
        asked: list[list[str]] = []

        def download(name: str, allow_patterns: list[str]) -> str:
            assert name == "someone/a-vit"
            asked.append(allow_patterns)
            if "pytorch_model*.bin" in allow_patterns:
                torch.save(tensors, tmp_path / "cache" / "pytorch_model.bin")
            return str(tmp_path / "cache")

        monkeypatch.setattr(sources, "snapshot_download", download)
        convert_checkpoint("transformers", "someone/a-vit", tmp_path / "out")
        assert [patterns[-1] for patterns in asked] == ["model*.safetensors", "pytorch_model*.bin"]
        assert "README.md" in asked[0]

    def test_offline(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="someone/a-vit is no file or folder, and the Hub") as caught:
            convert_checkpoint("transformers", "someone/a-vit", tmp_path / "out")
        assert "\n" not in str(caught.value)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_type": "swin"}, "is a Swin model.*apply_ailurus"),
            ({"model_type": "beit"}, "BEiT with relative position bias model.*apply_ailurus"),
            ({"model_type": "sam"}, "is a SAM model.*apply_ailurus"),
            ({"model_type": "bert"}, "model_type must be one of vit, .*, got 'bert'"),
            ({"model_type": ["vit"]}, "model_type must be one of"),
            ({"hidden_size": "32"}, r"config\.json is not valid"),
            ({"patch_size": [8, 4]}, "patch_size must be square"),
            ({"num_hidden_layers": 2}, "unexpected 16 keys"),
            ({"num_hidden_layers": 4}, r"missing 16 keys in the checkpoint: encoder\.layer\.3"),
            ({"intermediate_size": 64}, r"wrong shape of encoder\.layer\.0\.intermediate\.dense"),
            ({"quantization_config": {"bits": 4}}, "quantised"),
            ({"num_hidden_layers": 10**9}, r"give the model 1000000000 layers, but there are \d+ tensors"),
            ({"num_labels": 10**9, "id2label": None}, "num_labels must be at most 1000000, got 1000000000"),
            ({"architectures": [1]}, r"architectures must be a list of class names, got \[1\]"),
        ],
    )
    def test_settings(self, change: dict[str, Any], said: str, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        path = tmp_path / "source" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(CheckpointError, match=said) as caught:
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"image_std": 0}, "image_std must be finite and above 0, got 0"),
            ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be finite and above 0"),
            ({"image_std": [float("nan")] * 3}, "image_std must be finite and above 0"),
            ({"image_std": [0.5]}, "image processor's settings are not valid: std must have 3 elements"),
            ({"image_mean": [float("inf")] * 3}, "image_mean must be finite"),
            ({"rescale_factor": 0}, "rescale_factor must be finite and above 0"),
            ({"resample": 99}, "Unknown resampling filter"),
            ({"size": {"height": 0, "width": 8}}, "Size must contain"),
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"verify": False}])
    def test_preprocessing(self, change: dict[str, Any], said: str, options: dict[str, Any], tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps({"size": 32, **change}))
        with pytest.raises(CheckpointError, match=said) as caught:
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["source"]

    def test_files(self, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        (tmp_path / "source" / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json is not a readable JSON"):
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
        (tmp_path / "source" / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no config\.json beside"):
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a.index.json"])
    def test_shards_stay_in_their_folder(self, name: str, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        (tmp_path / "source" / "model.safetensors").unlink()
        index = tmp_path / "source" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"layernorm.weight": name}}))
        with pytest.raises(CheckpointError, match="files of the same folder"):
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        (tmp_path / "source" / "model.safetensors").unlink()
        index = tmp_path / "source" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"layernorm.weight": "model-1.safetensors"}}))
        with pytest.raises(FileNotFoundError, match=r"lists model-1\.safetensors"):
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")

    def test_an_unknown_tensor(self, tmp_path: Path) -> None:
        write_native(tmp_path / "source", "vit", 4)
        path = tmp_path / "source" / "model.safetensors"
        save_file(load_file(path) | {"lm_head.weight": torch.zeros(2, 2)}, path)
        with pytest.raises(CheckpointError, match=r"unknown to this recipe: lm_head\.weight"):
            convert_checkpoint("transformers", tmp_path / "source", tmp_path / "out")
