"""LookupViT behind transformers' doors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForVideoClassification,
    BertConfig,
    BertLMHeadModel,
    DPTConfig,
    DPTForDepthEstimation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    pipeline,
)

from ailurus_hf import (
    AiluRusImageProcessor,
    LookupViTBackbone,
    LookupViTForImageClassification,
    LookupViTForSemanticSegmentation,
    LookupViTForVideoClassification,
    LookupViTModel,
    LookupViTVideoProcessor,
    save_with_code,
    with_budget,
)
from ailurus_hf.benchmark import count_flops
from ailurus_hf.cli.app import main
from ailurus_hf.data import SegmentationDataset, open_layout
from ailurus_hf.training import SegmentationTrainer
from tests.data.files import IGNORE, NUM_LABELS, write_camvid
from tests.factories import random_images, random_videos, tiny_lookupvit, tiny_lookupvit_config
from tests.paths import ROOT

VIDEO = {"num_frames": 4, "tubelet_size": 2}


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, LookupViTModel),
        (AutoModelForSemanticSegmentation, LookupViTForSemanticSegmentation),
        (AutoModelForImageClassification, LookupViTForImageClassification),
        (AutoModelForVideoClassification, LookupViTForVideoClassification),
    ],
)
def test_auto_classes_load_a_folder(auto_class, model_class, tmp_path):
    video = model_class is LookupViTForVideoClassification
    model = tiny_lookupvit(model_class, **(VIDEO if video else {}))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    pixels = random_videos() if video else random_images()
    assert torch.equal(loaded(pixels)[0], model(pixels)[0])
    other = auto_class.from_pretrained(tmp_path, compressed_size=2)
    assert torch.equal(other(pixels)[0], model(pixels, compressed_size=2)[0])


def test_encoder_and_backbone_load_from_checkpoints_with_heads(tmp_path):
    tiny_lookupvit(LookupViTForImageClassification).save_pretrained(tmp_path / "classes")
    tiny_lookupvit(LookupViTForSemanticSegmentation).save_pretrained(tmp_path / "pixels")
    assert type(AutoBackbone.from_config(tiny_lookupvit_config())) is LookupViTBackbone
    for part, folder, missing in (
        (LookupViTModel, "classes", set()),
        (LookupViTBackbone, "classes", set()),
        (LookupViTBackbone, "pixels", set()),
        (LookupViTModel, "pixels", {"compressed_layernorm.weight", "compressed_layernorm.bias"}),
    ):
        _, info = part.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert set(info["missing_keys"]) == missing


def test_upernet_on_a_lookupvit_backbone():
    backbone = tiny_lookupvit_config(out_features=["stem", "stage1", "stage2", "stage3"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config).eval()
    assert isinstance(model.backbone, LookupViTBackbone)
    output = model(random_images(), labels=torch.zeros(2, 48, 48, dtype=torch.int64))
    assert output.logits.shape == (2, 3, 48, 48)
    output.loss.backward()
    assert model.backbone.layers[0].gather.k_proj.weight.grad is not None
    with with_budget(model, compressed_size=2), torch.no_grad():
        assert not torch.equal(model(random_images()).logits, output.logits)


def test_dpt_on_a_lookupvit_backbone():
    backbone = tiny_lookupvit_config(
        out_features=["stem", "stage1", "stage2", "stage3"], reshape_hidden_states=False, compressed_size=(2, 5)
    )
    config = DPTConfig(
        backbone_config=backbone, hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    model = DPTForDepthEstimation(config).eval()
    assert isinstance(model.backbone, LookupViTBackbone)
    depth = model(random_images(2, 64, 96)).predicted_depth
    assert depth.shape[0] == 2
    assert depth.isfinite().all()


def test_captioning_with_a_frozen_encoder(tmp_path):
    """A decoder learns to name one of two pictures; the encoder's compressed size is drawn meanwhile."""
    torch.manual_seed(0)
    decoder = BertLMHeadModel(
        BertConfig(vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                   is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=tiny_lookupvit(LookupViTModel), decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    model.encoder.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    images, captions = random_images(2), torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(60):
        loss = model(pixel_values=images, labels=captions).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert isinstance(loaded.encoder, LookupViTModel)
    for size in (2, (3, 5)):
        with with_budget(loaded, compressed_size=size):
            written = loaded.generate(pixel_values=images, max_new_tokens=4, num_beams=1, do_sample=False)
        assert written[:, 1:].tolist() == captions.tolist()


def test_pipelines(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 84, 3), dtype=np.uint8))
    for model_class, task in (
        (LookupViTForImageClassification, "image-classification"),
        (LookupViTForSemanticSegmentation, "image-segmentation"),
    ):
        folder = tmp_path / task
        tiny_lookupvit(model_class).save_pretrained(folder)
        AiluRusImageProcessor().save_pretrained(folder)
        result = pipeline(task, model=str(folder))(picture)
        if task == "image-classification":
            assert len(result) == 5
        else:
            assert sum(np.asarray(entry["mask"], dtype=bool).sum() for entry in result) == 60 * 84


REMOTE = """
import sys
sys.modules["ailurus_hf"] = None  # as if not installed
import torch
from transformers import (AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification,
                          AutoModelForSemanticSegmentation, AutoModelForVideoClassification)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
folder, images, out, video = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True, compressed_size=(2, 4)).eval()
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
assert AutoBackbone.from_config(config, trust_remote_code=True).channels == [32]
torch.save(model(torch.load(images)).logits.detach(), out)
model.save_pretrained(out + "-again")
AutoModelForSemanticSegmentation.from_pretrained(out + "-again", trust_remote_code=True)
model = AutoModelForVideoClassification.from_pretrained(video, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(video, trust_remote_code=True)
frames = torch.zeros(9, 48, 48, 3, dtype=torch.uint8)
assert model(**processor(frames, return_tensors="pt")).logits.shape == (1, 5)
"""


def test_exported_code_runs_without_the_package(tmp_path):
    model = tiny_lookupvit(LookupViTForSemanticSegmentation)
    folder = save_with_code(model, tmp_path / "shared-model")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoBackbone", "AutoImageProcessor",
                             "AutoModelForSemanticSegmentation", "AutoModelForImageClassification",
                             "AutoModelForVideoClassification"}  # fmt: skip
    files = {path.name for path in folder.glob("*.py")}
    assert {"configuration_lookupvit.py", "layers_lookupvit.py", "modeling_lookupvit.py", "settings.py"} <= files
    assert "modeling_ailurus.py" not in files
    card = (folder / "README.md").read_text()
    for wanted in ("compressed size 3, trained at 2, 3, 5;", "2407.12753", "compressed_size=5, trust_remote", "koner"):
        assert wanted in card
    assert "2311.01197" not in card
    classifier = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO)
    video = save_with_code(classifier, tmp_path / "video", LookupViTVideoProcessor(num_frames=4))
    card = (video / "README.md").read_text()
    for wanted in ("pipeline_tag: video-classification", "positions for a 2 x 6 x 6 grid", "videos of 4 frames or"):
        assert wanted in card
    images = random_images(2, 40, 60)
    torch.save(images, tmp_path / "images.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(folder), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt"), str(video)]
    subprocess.run([sys.executable, "-c", REMOTE, *arguments], check=True, env=environment, cwd=tmp_path)
    model.config.compressed_size = (2, 4)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images).logits)


@pytest.mark.parametrize("video", [False, True])
def test_trainer_fine_tunes_and_evaluates(tmp_path, video):
    """In training the sizes are drawn; evaluation has the configured one, and sees logits and labels only."""
    if video:
        model, pixels = tiny_lookupvit(LookupViTForVideoClassification, **VIDEO), random_videos(4)
    else:
        model, pixels = tiny_lookupvit(LookupViTForImageClassification), random_images(4)
    data = [{"pixel_values": image, "labels": index} for index, image in enumerate(pixels)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=4, logging_steps=1, report_to=[], learning_rate=3e-3,
        use_cpu=True, remove_unused_columns=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    output = trainer.predict(data)
    assert output.predictions.shape == (4, 5)
    with torch.no_grad():
        np.testing.assert_allclose(output.predictions, model.eval()(pixels).logits, rtol=1e-4, atol=1e-4)
    assert (output.predictions.argmax(1) == output.label_ids).all()


# peft 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_in_every_part_of_the_blocks():
    model = tiny_lookupvit(LookupViTForImageClassification)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["classifier"]))
    adapted.train()
    adapted(random_images(), labels=torch.tensor([1, 2])).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert sum("lora_A" in name for name in trained) == 3 * 3  # blocks; gathering, refining, infusing
    assert all("lora" in name or "classifier" in name for name in trained)
    with with_budget(adapted, compressed_size=2), torch.no_grad():
        assert adapted(random_images()).logits.shape == (2, 5)


@pytest.mark.slow
def test_two_processes_keep_the_same_weights(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "-m", "tests.on_processes_lookupvit", str(tmp_path / "result")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=300)
    first, second = (json.loads((tmp_path / f"result.{index}").read_text()) for index in range(2))
    assert first["processes"] == 2
    assert first["sums"] == second["sums"]


def test_flops_fall_with_the_budget_on_images_and_videos():
    for model in (
        tiny_lookupvit(LookupViTForSemanticSegmentation),
        tiny_lookupvit(LookupViTForVideoClassification, **VIDEO),
    ):
        counts = [count_flops(model, 64, 64, compressed_size=size) for size in (2, 5, 8)]
        assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("model_class", "settings", "kind", "tokens", "compressed"),
    [
        (LookupViTForSemanticSegmentation, {}, "image", "6 x 6 = 36", 10),
        (LookupViTForVideoClassification, {**VIDEO, "compressed_size": (1, 2, 5)}, "video", "2 x 6 x 6 = 72", 10),
    ],
)
def test_info(tmp_path, capfd, model_class, settings, kind, tokens, compressed):
    model = tiny_lookupvit(model_class, **settings)
    model.save_pretrained(tmp_path / "model")
    size = "2x5" if kind == "image" else "1x2x5"
    capfd.readouterr()
    assert main(["info", str(tmp_path / "model"), "--compressed-size", size, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["architecture"]["class"] == model_class.__name__
    assert report["compression"]["compressed_size"] == [int(side) for side in size.split("x")]
    cost = report[f"one {kind} of 48 x 48 pixels"]
    assert (cost["tokens"], cost["compressed tokens"]) == (tokens, compressed)
    given = [int(side) for side in size.split("x")]
    assert cost["GFLOPs"] == round(count_flops(model, 48, 48, compressed_size=given) / 1e9, 2)
    for wrong, message in (
        (["--compressed-size", "9x9x9x9"], "compressed_size must be one number or"),
        (["--keep-ratio", "0.5"], f"{model_class.__name__}, which has no setting keep_ratio"),
    ):
        assert main(["info", str(tmp_path / "model"), *wrong]) == 2
        assert message in capfd.readouterr().err


@pytest.fixture
def segmenter(tmp_path, monkeypatch):
    """A working folder with a checkpoint, "model", and labelled pictures, "data"."""
    monkeypatch.chdir(tmp_path)
    write_camvid(Path("data"))
    settings = {"num_labels": NUM_LABELS, "semantic_loss_ignore_index": IGNORE, "compressed_sizes": (1, 2)}
    model = tiny_lookupvit(LookupViTForSemanticSegmentation, compressed_size=2, **settings)
    model.save_pretrained("model")
    AiluRusImageProcessor().save_pretrained("model")
    return model


def test_evaluate_and_predict(segmenter, capfd):
    data = ["--images", "data/val/images", "--labels", "data/val/labels"]
    capfd.readouterr()
    assert main(["evaluate", "--model", "model", *data, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [budget["compressed_size"] for budget in report["budgets"]] == ["2 x 2", "1 x 1"]
    sizes = ["--compressed-size", "1x2", "--compressed-size", "2"]
    assert main(["evaluate", "--model", "model", *data, *sizes, "--per-class"]) == 0
    out = capfd.readouterr().out
    for wanted in ("compressed_size", "1 x 2", "2 x 2"):
        assert wanted in out
    for size in ("1", "2x1"):
        assert main(["predict", "data/val/images", "--model", "model", "--compressed-size", size, "--json"]) == 0
        assert len(json.loads(capfd.readouterr().out)) == 3
    for command, message in (
        (["predict", "data/val/images", "--model", "model", "--compressed-size", "90"], "at most the grid of"),
        (["predict", "data/val/images", "--model", "model", "--compressed-size", "5by7"], "got '5by7'"),
        (["predict", "data/val/images", "--model", "model", "--keep-ratio", "0.5"], "has no setting keep_ratio"),
        (["evaluate", "--model", "model", *data, "--keep-ratio", "0.5"], "has no setting 'keep_ratio'"),
    ):
        assert main(command) == 2
        assert message in capfd.readouterr().err
    picture = str(next(Path("data/val/images").iterdir()))
    assert main(["visualize", picture, "--model", "model"]) == 2
    assert "merges no tokens: there are no clusters to draw" in capfd.readouterr().err


def test_segmentation_trainer_and_its_card(segmenter):
    train, val = (
        SegmentationDataset(source, AiluRusImageProcessor(), ignore_index=source.rule.ignore_index)
        for source in open_layout("data")
    )
    arguments = TrainingArguments(
        "run", max_steps=2, per_device_train_batch_size=1, per_device_eval_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SegmentationTrainer(segmenter, arguments, train_dataset=train, eval_dataset=val)
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_keep_ratio" not in metrics
    trainer.save_model()
    trainer.create_model_card(dataset="Drawn")
    card = Path("run/README.md").read_text()
    assert f"| as configured | {metrics['eval_mean_iou']:.4f} |" in card
    assert "keep_ratio" not in card
