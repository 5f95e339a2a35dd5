"""The timm, DINO, DINOv2 and MAE recipes: names, settings, outputs of the original code, and what is refused."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

import ailurus_hf
from ailurus_hf import AiluRusConfig
from ailurus_hf.cli.app import main
from ailurus_hf.conversion import CheckpointError, CheckpointWarning, convert_checkpoint
from ailurus_hf.conversion.engine import check_rules_used, map_keys
from ailurus_hf.conversion.reading.sources import find_weights
from ailurus_hf.conversion.recipes.timm_style import TimmParts, encoder_rules
from tests.conversion.vit_files import HEADS, vit_tensors, write_timm
from tests.paths import golden

TOLERANCE = 3e-5


def load(folder: Path, report: Any, **settings: Any) -> Any:
    return getattr(ailurus_hf, report.model_class).from_pretrained(folder, keep_ratio=1.0, **settings).eval()


@torch.no_grad()
def outputs(model: Any, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every output that a golden of these projects may have recorded, by a name of our own."""
    encoder = getattr(model, "ailurus", model)
    states = encoder(pixel_values, output_hidden_states=True)
    prefix = model.config.num_prefix_tokens
    grid = model.config.patch_grid(*pixel_values.shape[-2:])
    found = {"tokens": states.last_hidden_state, "pooled": states.pooler_output}
    for index, hidden in enumerate(states.hidden_states[1:]):
        normed = encoder.layernorm(hidden)
        found |= {
            f"normed{index}": normed,
            f"prefix{index}": normed[:, :prefix],
            f"raw_prefix{index}": hidden[:, :prefix],
        }
        found[f"map{index}"] = normed[:, prefix:].transpose(1, 2).unflatten(2, grid)
        found[f"raw_map{index}"] = hidden[:, prefix:].transpose(1, 2).unflatten(2, grid)
    if hasattr(model, "classifier"):
        found["logits"] = model(pixel_values).logits
    return found


TIMM = {"tokens": "tokens", "logits": "logits"} | {f"block{i}_feature_map": f"raw_map{i}" for i in range(3)}
TIMM |= {f"block{i}_prefix_tokens": f"raw_prefix{i}" for i in range(3)}
DINO = {"cls": "pooled", "intermediate1_tokens": "normed1", "intermediate2_tokens": "normed2"}
DINOV2 = {"x_norm_clstoken": "pooled", "x_norm_patchtokens": "patches"}
DINOV2 |= {f"intermediate{i}_feature_map": f"map{i}" for i in (0, 2)}
DINOV2 |= {f"intermediate{i}_class_token": f"class{i}" for i in (0, 2)}
MAE = {"encoder_tokens": "tokens", "pooled": "pooled", "logits": "logits"}
GOLDENS = [
    ("timm", "timm_vit/vit_cls", "", TIMM),
    ("timm", "timm_vit/vit_cls_dynamic", "", TIMM | {"logits": "pooled"}),
    ("dino", "dino/backbone", "", DINO),
    ("dino", "dino/full_checkpoint", "", DINO),
    ("dinov2", "dinov2/vit_mlp", "", DINOV2),
    ("mae", "mae/pretrain_full", "mae_pretrain_vit_tiny.pth", MAE),
    ("mae", "mae/pretrain_full", "checkpoint-1.pth", MAE),
    ("mae", "mae/finetune_cls", "", MAE),
    ("mae", "mae/finetune_gap", "", MAE),
]


class TestGoldens:
    @pytest.mark.parametrize(("recipe", "name", "file", "names"), GOLDENS, ids=lambda value: str(value)[:40])
    def test_every_recorded_output(
        self, recipe: str, name: str, file: str, names: dict[str, str], tmp_path: Path
    ) -> None:
        folder = golden(*name.split("/"))
        settings = {} if recipe == "timm" else {"num_attention_heads": 3}
        report = convert_checkpoint(recipe, folder / file, tmp_path / "out", **settings)
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert "golden.safetensors" in report.verification.against
        expected = load_file(folder / "golden.safetensors")
        model = load(tmp_path / "out", report)
        compared = 0
        for case in ("", "resized_"):
            if f"{case}pixel_values" not in expected:
                continue
            found = outputs(model, expected[f"{case}pixel_values"])
            found["patches"] = found["tokens"][:, model.config.num_prefix_tokens :]
            found |= {f"class{i}": found[f"prefix{i}"][:, 0] for i in range(3) if f"prefix{i}" in found}
            for theirs, ours in names.items():
                if f"{case}{theirs}" in expected:
                    assert (found[ours] - expected[f"{case}{theirs}"]).abs().max() <= TOLERANCE, f"{case}{theirs}"
                    compared += 1
        inputs = [key for key in expected if key.endswith("pixel_values")]
        attentions = [key for key in expected if key.endswith("attention")]
        assert compared == len(expected) - len(inputs) - len(attentions)

    @pytest.mark.parametrize("name", ["dino/backbone", "dino/full_checkpoint"])
    def test_attention_of_dino(self, name: str, tmp_path: Path) -> None:
        folder = golden(*name.split("/"))
        report = convert_checkpoint("dino", folder, tmp_path / "out", num_attention_heads=3)
        model = load(tmp_path / "out", report, attn_implementation="eager")
        expected = load_file(folder / "golden.safetensors")
        for case in ("", "resized_"):
            with torch.no_grad():
                found = model(expected[f"{case}pixel_values"], output_attentions=True).attentions[-1]
            assert (found - expected[f"{case}last_self_attention"]).abs().max() <= 1e-5

    def test_a_wrong_number_of_heads_is_caught(self, tmp_path: Path) -> None:
        """Only by recorded outputs: no file tells it, so the reference has to believe it too."""
        with pytest.raises(CheckpointError, match="differ from the recorded"):
            convert_checkpoint("dinov2", golden("dinov2", "vit_mlp"), tmp_path / "out", num_attention_heads=6)


@pytest.mark.parametrize(
    ("recipe", "parts", "wrong"),
    [
        ("timm", "cls_token norm qkv_bias head", {"position_antialias": False}),
        ("timm", "cls_token norm qkv_bias", {"layer_norm_eps": 1e-1}),
        ("dino", "cls_token norm qkv_bias", {"position_offset": 0.0}),
        ("dinov2", "cls_token mask_token norm qkv_bias ls", {"layer_norm_eps": 1e-1}),
        ("mae", "cls_token fc_norm qkv_bias head", {"pooling": "cls"}),
        ("mae", "cls_token norm qkv_bias head", {"hidden_act": "relu"}),
    ],
)
def test_a_wrong_setting_is_caught(recipe: str, parts: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    torch.save(vit_tensors(parts), tmp_path / "x.pth")
    settings = {"num_attention_heads": HEADS} | wrong
    with pytest.raises(CheckpointError, match="differ from"):
        convert_checkpoint(recipe, tmp_path / "x.pth", tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("case", ["", "resized_"])
def test_recorded_outputs_are_compared_at_both_sizes(case: str, tmp_path: Path) -> None:
    source = write_timm(tmp_path / "source", vit_tensors("cls_token norm qkv_bias head"))
    recorded = {f"{case}pixel_values": torch.randn(1, 3, 32, 40), f"{case}logits": torch.zeros(1, 5)}
    save_file(recorded, source / "golden.safetensors")
    with pytest.raises(CheckpointError, match=r"the recorded logits of golden\.safetensors"):
        convert_checkpoint("timm", source, tmp_path / "out")


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # parts, of vit_tensors, model_args of timm
    "plain": ("cls_token norm qkv_bias", {}, {}),
    "classifier": ("cls_token norm qkv_bias head", {}, {"num_classes": 5}),
    "no class token": ("norm qkv_bias head", {"position_rows": 0}, {"class_token": False, "global_pool": "avg"}),
    "registers": ("cls_token reg_token norm qkv_bias", {"position_rows": 3}, {"reg_tokens": 2}),
    "registers without positions": (
        "cls_token reg_token norm qkv_bias",
        {"position_rows": 0},
        {"reg_tokens": 2, "no_embed_class": True},
    ),
    "layer scale": ("cls_token norm qkv_bias ls", {}, {"init_values": 1e-5}),
    "fc_norm": ("cls_token fc_norm qkv_bias head", {}, {"global_pool": "avg"}),
    "no qkv bias": ("cls_token norm", {}, {"qkv_bias": False}),
    "qk norm": ("cls_token norm qkv_bias qk_norm", {}, {"qk_norm": True}),
    "distilled": ("cls_token dist_token norm qkv_bias head head_dist", {"position_rows": 2}, {}),
    "not square": ("cls_token norm qkv_bias", {"grid": (2, 5)}, {"img_size": [16, 40]}),
    "patch 14": ("cls_token norm qkv_bias", {"patch": 14}, {"img_size": 56}),
    "patch 16": ("cls_token norm qkv_bias", {"patch": 16}, {"img_size": [64, 64]}),
    "patch 32": ("cls_token norm qkv_bias", {"patch": 32}, {"img_size": 128}),
}


class TestTimm:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_variants(self, name: str, tmp_path: Path) -> None:
        """Compared with the formulas written out in `references/vit.py`, at the trained size and at another."""
        parts, shape, arguments = VARIANTS[name]
        source = write_timm(tmp_path / "source", vit_tensors(parts, **shape), **arguments)
        report = convert_checkpoint("timm", source, tmp_path / "out")
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert report.model_class == ("AiluRusForImageClassification" if "head" in parts else "AiluRusModel")

    def test_preprocessing_and_licence(self, tmp_path: Path) -> None:
        source = write_timm(tmp_path / "source", vit_tensors("cls_token norm qkv_bias head"))
        convert_checkpoint("timm", source, tmp_path / "out")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert processor.size["shortest_edge"] == 40
        image = torch.zeros(3, 60, 50, dtype=torch.uint8)
        assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "cc-by-4.0"

    @pytest.mark.parametrize("told", [True, False])
    def test_heads_that_no_file_tells_are_said(self, told: bool, tmp_path: Path) -> None:
        """A width that published models have; three heads of 64 channels."""
        tensors = {"pos_embed": torch.randn(1, 5, 192), "patch_embed.proj.weight": torch.randn(192, 3, 8, 8)}
        tensors |= {"blocks.0.attn.qkv.weight": torch.randn(576, 192), "blocks.0.attn.proj.weight": torch.eye(192)}
        tensors |= {"blocks.0.mlp.fc1.weight": torch.randn(8, 192), "blocks.0.mlp.fc2.weight": torch.randn(192, 8)}
        biases = {"patch_embed.proj": 192, "blocks.0.attn.proj": 192, "blocks.0.mlp.fc1": 8, "blocks.0.mlp.fc2": 192}
        tensors |= {f"{name}.bias": torch.zeros(size) for name, size in biases.items()} | {
            "cls_token": torch.ones(1, 1, 192)
        }
        norms = ("blocks.0.norm1", "blocks.0.norm2", "norm")
        tensors |= {f"{name}.{part}": torch.ones(192) for name in norms for part in ("weight", "bias")}
        torch.save(tensors, tmp_path / "x.pth")
        settings = {"num_attention_heads": 3} if told else {}
        report = convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", dry_run=True, **settings)
        said = "num_attention_heads=3, as in published models of 192 channels"
        assert [text[: len(said)] for text in report.assumptions] == ([] if told else [said])

    def test_a_bare_file(self, tmp_path: Path) -> None:
        torch.save({"state_dict": 1, "model": vit_tensors()}, tmp_path / "x.pth")
        convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        assert AiluRusConfig.from_pretrained(tmp_path / "out").position_antialias

    @pytest.mark.parametrize(
        ("parts", "arguments", "said"),
        [
            ("cls_token norm qkv_bias", {"num_heads": None}, "add --set num_attention_heads=N"),
            ("cls_token norm qkv_bias head", {"global_pool": "map"}, "must be 'token' or 'avg', got 'map'"),
            (
                "cls_token norm qkv_bias",
                {"act_layer": "quick_gelu"},
                "act_layer must be None or 'gelu', got 'quick_gelu'",
            ),
            ("cls_token norm qkv_bias", {"img_size": "64"}, "img_size must be"),
            ("cls_token norm qkv_bias", {"img_size": 64}, "wrong shape of pos_embed"),
            ("cls_token norm qkv_bias", {"no_embed_class": True}, "wrong shape of pos_embed"),
        ],
    )
    def test_refusals(self, parts: str, arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
        source = write_timm(tmp_path / "source", vit_tensors(parts), **arguments)
        with pytest.raises(CheckpointError, match=said):
            convert_checkpoint("timm", source, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("norm_pre.weight", "a norm before the first block"),
            ("attn_pool.latent", "attention pooling"),
            ("blocks.0.attn.relative_position_bias_table", "BEiT with relative position bias model.*apply_ailurus"),
            ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin model.*apply_ailurus"),
            ("blocks.0.attn.rel_pos_h", "ViTDet"),
            ("rope.periods", "rotary"),
            ("extra.weight", r"unknown to this recipe: extra\.weight"),
        ],
    )
    def test_parts_that_are_not_ported(self, name: str, said: str, tmp_path: Path) -> None:
        source = write_timm(tmp_path / "source", vit_tensors() | {name: torch.zeros(3)})
        with pytest.raises(CheckpointError, match=said):
            convert_checkpoint("timm", source, tmp_path / "out")

    def test_a_block_left_out(self, tmp_path: Path) -> None:
        tensors = {name: tensor for name, tensor in vit_tensors().items() if not name.startswith("blocks.1.")}
        with pytest.raises(CheckpointError, match=r"missing in the checkpoint: all of blocks\.1"):
            convert_checkpoint("timm", write_timm(tmp_path / "source", tensors), tmp_path / "out")

    def test_the_grid_must_be_square_or_told(self, tmp_path: Path) -> None:
        torch.save(vit_tensors(grid=(2, 5)), tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="10 rows for patches, which is no square grid; add --set image_size"):
            convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS, image_size=[16, 40])


# what stands before the names of a file, and the entry it is in
WRAPPED = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_orig_mod.module."]


class TestTrainingFiles:
    """What timm's training script and its like write: wrappers before the names, arguments, averaged weights."""

    @pytest.mark.parametrize("prefix", WRAPPED)
    @pytest.mark.parametrize("recipe", ["timm", "auto"])
    def test_wrappers(self, recipe: str, prefix: str, tmp_path: Path) -> None:
        tensors = {prefix + name: tensor for name, tensor in vit_tensors("cls_token norm qkv_bias head").items()}
        content = {"epoch": 3, "arch": "vit", "args": Namespace(lr=0.1), "state_dict": tensors}
        (tmp_path / "source").mkdir()
        torch.save(content, tmp_path / "source" / "model_best.pth.tar")
        report = convert_checkpoint(recipe, tmp_path / "source", tmp_path / "out", num_attention_heads=HEADS)
        assert report.recipe == "timm"
        assert report.verification is not None
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights["ailurus.embeddings.cls_token"], tensors[f"{prefix}cls_token"])

    @pytest.mark.parametrize("prefix", WRAPPED)
    @pytest.mark.parametrize(("recipe", "entry"), [("dino", "teacher"), ("mae", "model"), ("dinov2", "teacher")])
    def test_wrappers_of_other_projects(self, recipe: str, entry: str, prefix: str, tmp_path: Path) -> None:
        parts = "cls_token norm qkv_bias" + (" ls mask_token" if recipe == "dinov2" else "")
        tensors = {prefix + name: tensor for name, tensor in vit_tensors(parts).items()}
        torch.save({entry: tensors}, tmp_path / "x.pth")
        report = convert_checkpoint(recipe, tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        assert report.verification is not None

    @pytest.mark.parametrize(("entry", "twin"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
    def test_weights_that_are_there_twice(self, entry: str, twin: str, tmp_path: Path) -> None:
        tensors, averaged = vit_tensors(), {f"module.{name}": tensor for name, tensor in vit_tensors(seed=1).items()}
        torch.save({entry: tensors, twin: averaged, "args": Namespace(lr=0.1)}, tmp_path / "x.pth")
        said = f"holds weights in '{entry}' and '{twin}'; '{entry}' was taken, entry='{twin}' .--entry {twin}. takes"
        with pytest.warns(CheckpointWarning, match=said):
            convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "ema", num_attention_heads=HEADS, entry=twin)
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "ema"))
        assert torch.equal(first["embeddings.cls_token"], tensors["cls_token"])
        assert torch.equal(second["embeddings.cls_token"], averaged["module.cls_token"])

    def test_averaged_weights_alone(self, tmp_path: Path) -> None:
        torch.save({"state_dict_ema": vit_tensors(), "state_dict": 1}, tmp_path / "x.pth")
        convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)

    def test_an_entry_that_is_not_there(self, tmp_path: Path) -> None:
        torch.save({"model": vit_tensors(), "epoch": 1}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="no entry 'model_ema' with tensors; its entries are 'model'"):
            convert_checkpoint("timm", tmp_path / "x.pth", tmp_path / "out", entry="model_ema")

    def test_the_student_of_dino_is_an_entry_too(self, tmp_path: Path) -> None:
        teacher, student = (vit_tensors(prefix="backbone.", seed=seed) for seed in (0, 1))
        torch.save({"teacher": teacher, "student": student}, tmp_path / "x.pth")
        settings = {"num_attention_heads": HEADS, "entry": "student"}
        convert_checkpoint("dino", tmp_path / "x.pth", tmp_path / "out", **settings)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights["embeddings.cls_token"], student["backbone.cls_token"])

    def test_folders_of_runs(self, tmp_path: Path) -> None:
        for name in ("last.pth.tar", "model_best.pth.tar", "checkpoint-9.pth.tar"):
            (tmp_path / name).touch()
        assert find_weights(tmp_path).name == "model_best.pth.tar"
        (tmp_path / "model_best.pth.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"which holds checkpoint-9\.pth\.tar, last\.pth\.tar"):
            find_weights(tmp_path)
        (tmp_path / "last.pth.tar").unlink()
        (tmp_path / "data.tar").touch()
        assert find_weights(tmp_path).name == "checkpoint-9.pth.tar"


class TestDinov2:
    @pytest.mark.parametrize("chunks", [False, True])
    @pytest.mark.parametrize("parts", ["", "register_tokens", "swiglu", "register_tokens swiglu"])
    def test_variants(self, parts: str, chunks: bool, tmp_path: Path) -> None:
        tensors = vit_tensors(f"cls_token mask_token norm qkv_bias ls {parts}", chunks=chunks)
        torch.save(tensors, tmp_path / "x.pth")
        report = convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert list(report.dropped) == ["mask_token"]
        config = AiluRusConfig.from_pretrained(tmp_path / "out")
        registers = "register_tokens" in parts
        assert config.num_register_tokens == (2 if registers else 0)
        assert (config.position_offset, config.position_antialias) == ((0.0, True) if registers else (0.1, False))

    def test_a_training_checkpoint(self, tmp_path: Path) -> None:
        tensors = vit_tensors("cls_token mask_token norm qkv_bias ls", prefix="backbone.")
        torch.save({"teacher": tensors | {"dino_head.mlp.0.weight": torch.zeros(2, 2)}}, tmp_path / "x.pth")
        report = convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        assert set(report.dropped) == {"backbone.mask_token", "dino_head.mlp.0.weight"}

    @pytest.mark.parametrize(
        ("parts", "assumed", "other"),
        [
            ("", "position_offset=0.1, position_antialias=False", "position_offset=0 --set position_antialias=true"),
            (
                "register_tokens",
                "position_offset=0, position_antialias=True",
                "position_offset=0.1 --set position_antialias=false",
            ),
        ],
    )
    def test_what_the_file_does_not_tell_is_said(
        self, parts: str, assumed: str, other: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tensors = vit_tensors(f"cls_token mask_token norm qkv_bias ls {parts}")
        torch.save(tensors, tmp_path / "x.pth")
        options = ["--set", f"num_attention_heads={HEADS}"]
        assert main(["convert", "dinov2", str(tmp_path / "x.pth"), str(tmp_path / "out"), *options]) == 0
        (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("assumed")]
        assert assumed in line
        assert f"since the file does not tell; the other way in use is --set {other}" in line

        # what the other convention gives, recorded
        settings = dict(setting.split("=") for setting in other.split(" --set "))
        values = {name: json.loads(value) for name, value in settings.items()}
        report = convert_checkpoint(
            "dinov2", tmp_path / "x.pth", tmp_path / "other", num_attention_heads=HEADS, **values
        )
        assert not any("the file does not tell" in text for text in report.assumptions)
        pixel_values = torch.randn(1, 3, 48, 40)
        recorded = outputs(load(tmp_path / "other", report), pixel_values)["pooled"]
        golden_values = {"resized_pixel_values": pixel_values, "resized_x_norm_clstoken": recorded}
        save_file(golden_values, tmp_path / "golden.safetensors")
        with pytest.raises(CheckpointError, match="differ from the recorded") as caught:
            convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "third", num_attention_heads=HEADS)
        assert f"--set {other}" in str(caught.value)
        assert "\n" not in str(caught.value)
        convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "third", num_attention_heads=HEADS, **values)
        wrong = {"position_offset": 0.0 if parts else 0.1, "position_antialias": bool(parts)}
        with pytest.raises(
            CheckpointError, match=r"positions are resized with position_offset=.*, position_antialias="
        ):
            convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "4", num_attention_heads=HEADS, **wrong)

    def test_positions_may_be_resized_otherwise(self, tmp_path: Path) -> None:
        torch.save(vit_tensors("cls_token mask_token norm qkv_bias ls"), tmp_path / "x.pth")
        settings = {"num_attention_heads": HEADS, "position_offset": 0.0}
        report = convert_checkpoint("dinov2", tmp_path / "x.pth", tmp_path / "out", **settings)
        assert report.verification is not None
        assert AiluRusConfig.from_pretrained(tmp_path / "out").position_offset == 0.0


class TestDinoAndMae:
    @pytest.mark.parametrize(
        ("recipe", "parts", "extra", "settings"),
        [
            ("dino", "cls_token norm qkv_bias", (), {"position_offset": 0.1}),
            ("mae", "cls_token norm qkv_bias", ("mask_token", "decoder_pos_embed", "decoder_embed.bias"), {}),
            ("mae", "cls_token norm qkv_bias head", (), {"pooling": "cls", "num_labels": 5}),
            ("mae", "cls_token fc_norm qkv_bias head", (), {"pooling": "mean", "use_pooler_norm": True}),
        ],
    )
    def test_variants(
        self, recipe: str, parts: str, extra: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
    ) -> None:
        torch.save({"model": vit_tensors(parts) | {name: torch.ones(2) for name in extra}}, tmp_path / "x.pth")
        if recipe == "dino":
            torch.save(vit_tensors(parts), tmp_path / "x.pth")
        report = convert_checkpoint(recipe, tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        assert report.verification is not None
        assert report.verification.largest_difference <= TOLERANCE
        assert set(report.dropped) == set(extra)
        assert report.model_class == ("AiluRusForImageClassification" if "head" in parts else "AiluRusModel")
        config = AiluRusConfig.from_pretrained(tmp_path / "out")
        assert {name: getattr(config, name) for name in settings} == settings


class TestTraining:
    def test_objects_beside_the_tensors_are_harmless(self, tmp_path: Path) -> None:
        teacher = vit_tensors(prefix="backbone.") | {"head.last_layer.weight_g": torch.ones(2, 1)}
        student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
        torch.save({"student": student, "teacher": teacher, "args": Namespace(arch="x")}, tmp_path / "x.pth")
        report = convert_checkpoint("dino", tmp_path / "x.pth", tmp_path / "out", num_attention_heads=HEADS)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(weights["embeddings.cls_token"], teacher["backbone.cls_token"])
        assert list(report.dropped) == ["head.last_layer.weight_g"]

    def test_published_widths_have_known_heads(self, tmp_path: Path) -> None:
        torch.save(vit_tensors(), tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="none is published for tokens 32 wide"):
            convert_checkpoint("mae", tmp_path / "x.pth", tmp_path / "out")


class TestKeys:
    """Names as strings, without weights."""

    @pytest.mark.parametrize(
        ("source", "targets"),
        [
            ("cls_token", ["embeddings.cls_token"]),
            ("dist_token", ["embeddings.distillation_token"]),
            ("reg_token", ["embeddings.register_tokens"]),
            ("pos_embed", ["embeddings.position_embeddings"]),
            ("patch_embed.proj.weight", ["embeddings.patch_embeddings.projection.weight"]),
            ("blocks.11.norm1.bias", ["layers.11.layernorm_before.bias"]),
            ("blocks.0.attn.qkv.weight", [f"layers.0.attention.{n}_proj.weight" for n in "qkv"]),
            ("blocks.0.attn.proj.bias", ["layers.0.attention.o_proj.bias"]),
            ("blocks.0.attn.k_norm.bias", ["layers.0.attention.k_norm.bias"]),
            ("blocks.0.ls2.gamma", ["layers.0.layer_scale2.lambda1"]),
            ("blocks.0.norm2.weight", ["layers.0.layernorm_after.weight"]),
            ("blocks.0.mlp.fc2.weight", ["layers.0.mlp.fc2.weight"]),
            ("norm.weight", ["layernorm.weight"]),
            ("fc_norm.weight", ["pooler_norm.weight"]),
        ],
    )
    def test_one_by_one(self, source: str, targets: list[str]) -> None:
        keys = frozenset(vit_tensors("cls_token dist_token reg_token ls qk_norm fc_norm norm qkv_bias"))
        (mapping,) = map_keys(encoder_rules(TimmParts(keys), ""), [source])
        assert list(mapping.targets) == targets

    def test_gated_mlp_and_chunks(self) -> None:
        keys = frozenset(vit_tensors("cls_token swiglu norm", prefix="backbone.", chunks=True))
        rules = encoder_rules(TimmParts(keys, "backbone."), "ailurus.")
        mappings = {m.source: m.targets for m in map_keys(rules, keys)}
        check_rules_used(rules, map_keys(rules, keys))
        assert mappings["backbone.blocks.1.2.mlp.w12.bias"] == (
            "ailurus.layers.2.mlp.gate_proj.bias",
            "ailurus.layers.2.mlp.up_proj.bias",
        )

    def test_dry_run_lists_them(self, tmp_path: Path) -> None:
        source = write_timm(tmp_path / "source", vit_tensors())
        report = convert_checkpoint("timm", source, tmp_path / "out", dry_run=True)
        assert {row.source for row in report.key_table} == set(vit_tensors())
        assert json.dumps(report.to_dict())
        assert not (tmp_path / "out").exists()
