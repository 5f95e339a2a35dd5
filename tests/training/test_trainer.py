"""Trainer for segmentation: the loss under accumulation, exact evaluation, resuming, budgets, adapters, the card."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from torch.utils.data import ConcatDataset, Subset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, apply_ailurus
from ailurus_hf.data import SegmentationAugmentation, SegmentationDataset, open_layout
from ailurus_hf.evaluation import ConfusionMatrix, SegmentationMetrics, predictions_from_logits
from ailurus_hf.training import KeepRatioSchedule, SegmentationLoss, SegmentationTrainer, check_resume
from tests.data.files import IGNORE, NUM_LABELS, labelled_picture, write_camvid, write_labels
from tests.evaluation.test_loop import native
from tests.factories import tiny_model

PROCESSOR = AiluRusImageProcessor()


def network(**overrides):
    settings = {"num_labels": NUM_LABELS, "semantic_loss_ignore_index": IGNORE, "cluster_layer": 1, **overrides}
    return tiny_model(AiluRusForSemanticSegmentation, **settings)


def trainer_for(root, model, output="run", views=(24, 32), callbacks=None, trainer=None, **settings):
    train, val = open_layout(root)
    augmentation = SegmentationAugmentation(views) if views else None
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True,
        "per_device_eval_batch_size": 1, "report_to": "none", "disable_tqdm": True, "seed": 3, "save_strategy": "no",
    }  # fmt: skip
    return SegmentationTrainer(
        model,
        TrainingArguments(str(root / output), **{**defaults, **settings}),
        train_dataset=SegmentationDataset(train, PROCESSOR, augmentation, IGNORE),
        eval_dataset=SegmentationDataset(val, PROCESSOR, ignore_index=IGNORE),
        callbacks=callbacks,
        **(trainer or {}),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_camvid(tmp_path_factory.mktemp("data"), train=8)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_training_lowers_the_loss(data):
    trainer = trainer_for(data, network(), max_steps=40, learning_rate=3e-3)
    trainer.train()
    assert np.mean(losses(trainer)[-5:]) < 0.7 * np.mean(losses(trainer)[:5])


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_steps_equal_large_batches(data, weighted):
    """Though each picture has another number of ignored pixels."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = trainer_for(
            data, network(), max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            learning_rate=1e-2, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        if weighted:
            trainer.segmentation_loss.weight = torch.tensor([1.0, 3.0, 0.2, 1.0])
        trainer.train()
        found.append((losses(trainer), weights(trainer.model)))
    (whole_losses, whole_weights), (losses_of_parts, weights_of_parts) = found
    assert losses_of_parts == pytest.approx(whole_losses, rel=1e-4)
    torch.testing.assert_close(weights_of_parts, whole_weights, rtol=1e-4, atol=1e-6)


class StopAt(TrainerCallback):
    """As if the process were killed after a step that was not saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


# Those of the evaluation too.
PERSISTENT = {
    "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "loading",
    [{"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 2}, PERSISTENT],
    ids=["plain", "accumulated", "persistent workers"],
)
def test_a_resumed_run_has_the_same_curve(data, tmp_path, loading):
    """With everything that is random: views, order, dropout; killed in the middle of the second epoch."""
    settings = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 3, "trainer": {"layer_decay": 0.8}, **loading,
    }  # fmt: skip
    make = {"hidden_dropout_prob": 0.1}
    schedule = [KeepRatioSchedule([(0, 1.0), (0.5, 0.25)])]
    straight = trainer_for(data, network(**make), tmp_path / "straight", callbacks=schedule, **settings)
    straight.train()
    killed = trainer_for(data, network(**make), tmp_path / "killed", callbacks=[*schedule, StopAt(7)], **settings)
    killed.train()
    # What the stop saved after the last regular checkpoint is not there after a kill.
    shutil.rmtree(tmp_path / "killed" / "checkpoint-7", ignore_errors=True)
    resumed = trainer_for(data, network(seed=9, **make), tmp_path / "killed", callbacks=schedule, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(resumed)) == 9
    assert losses(resumed) == losses(straight)
    assert torch.equal(weights(resumed.model), weights(straight.model))


@pytest.mark.slow
def test_the_epoch_reaches_data_sets_inside_others(data, tmp_path):
    trainer = trainer_for(data, network(), tmp_path, max_steps=5, eval_strategy="no")
    views = trainer.train_dataset
    trainer.train_dataset = ConcatDataset([Subset(views, [0, 1]), Subset(views, [2, 3])])
    trainer.train()
    assert views.epoch == 2


def test_several_gpus_in_one_process_are_refused_where_evaluation_has_its_own_budget(data, tmp_path):
    """Replicas in other threads would not see it. A schedule writes to the configuration, which replicas share."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    assert SegmentationTrainer(network(), args, eval_keep_ratio=0.25).eval_keep_ratio == 0.25
    args._n_gpu = 2
    advice = r" does not work on 2 GPUs in one process .*: start with `accelerate launch` or `torchrun`"
    with pytest.raises(ValueError, match="^eval_keep_ratio=0.25" + advice):
        SegmentationTrainer(network(), args, eval_keep_ratio=0.25)
    plain = SegmentationTrainer(network(), args, callbacks=[KeepRatioSchedule([(0, 1.0), (0.5, 0.25)])])
    with pytest.raises(ValueError, match="^eval_keep_ratio=1" + advice):
        plain.eval_keep_ratio = 1


def test_resuming_needs_a_checkpoint_of_the_same_architecture(data, tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_for(data, network(), tmp_path / "none").train(resume_from_checkpoint=True)
    first = trainer_for(data, network(), tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    other = trainer_for(data, network(hidden_size=16), tmp_path / "run")
    with pytest.raises(ValueError, match=r"another architecture: \d+ tensors differ \(.* is \(.*\), here \(.*\)"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is absent, here"):
        check_resume(tmp_path / "run" / "checkpoint-1", network(num_register_tokens=1))
    with pytest.raises(FileNotFoundError, match="expected a checkpoint of a training run"):
        check_resume(tmp_path / "nowhere", first.model)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation_equals_a_loop(data, tmp_path, batch_size):
    """Also for pictures of different sizes, when they are evaluated one by one."""
    root = shutil.copytree(data, tmp_path / "data")
    if batch_size == 1:
        image, labels = labelled_picture(7, 33, 70)
        image.save(root / "val" / "images" / "009.png")
        write_labels(root / "val" / "labels" / "009.png", labels)
    trainer = trainer_for(root, network(), per_device_eval_batch_size=batch_size)
    for ratio in (1.0, 0.25):
        trainer.eval_keep_ratio = ratio
        metrics = trainer.evaluate()
        matrix, losses = ConfusionMatrix(NUM_LABELS, IGNORE), []
        model = network(keep_ratio=ratio)
        for sample in trainer.eval_dataset:
            logits = model(sample["pixel_values"][None]).logits
            matrix.update(logits.argmax(1)[0], sample["labels"])
            losses.append(torch.nn.functional.cross_entropy(logits, sample["labels"][None], ignore_index=IGNORE).item())
        if batch_size == 1:
            assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert metrics["eval_mean_iou"] == matrix.mean_iou()
        assert metrics["eval_pixel_accuracy"] == matrix.pixel_accuracy()
        assert metrics["eval_keep_ratio"] == ratio
    assert trainer.model.config.keep_ratio == 0.5


def test_a_plain_trainer_counts_the_same(data, tmp_path):
    args = TrainingArguments(
        str(tmp_path), batch_eval_metrics=True, per_device_eval_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    own = trainer_for(data, network(), tmp_path)
    plain = Trainer(
        network(), args, eval_dataset=own.eval_dataset, compute_metrics=SegmentationMetrics(NUM_LABELS, IGNORE),
        preprocess_logits_for_metrics=predictions_from_logits,
    )  # fmt: skip
    found, expected = plain.evaluate(), own.evaluate()
    for name in ("eval_mean_iou", "eval_pixel_accuracy"):
        assert found[name] == expected[name]


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"activation_checkpointing": True}], ids=["bf16", "checkpointing"]
)
def test_training_modes(data, settings):
    plain = trainer_for(data, network())
    plain.train()
    changed = trainer_for(data, network(), **settings)
    changed.train()
    tolerance = 0.05 if "bf16" in settings else 1e-5
    assert losses(changed) == pytest.approx(losses(plain), rel=tolerance)


# peft 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_adapters_in_the_encoder_alone(data, tmp_path):
    """Only the adapters and the head change; the adapters are what is saved."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"])
    adapted = get_peft_model(model, config)
    trainer = trainer_for(
        data, adapted, tmp_path / "lora", learning_rate=1e-2, trainer={"eval_keep_ratio": 0.25},
        callbacks=[KeepRatioSchedule([(0, 1.0), (0.5, 0.5)])],
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_keep_ratio"] == 0.25
    frozen = {name.replace(".base_layer", ""): p for name, p in adapted.named_parameters() if "ailurus" in name}
    changed = [name for name, parameter in frozen.items() if "lora" in name and parameter.abs().max() > 0]
    assert len(changed) == 4 * 2 * 2  # layers, projections, A and B
    for name, parameter in frozen.items():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.removeprefix("base_model.model.")]), name
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model()
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "library_name: peft" in card
    assert "merge_and_unload" in card
    assert "| 0.25 |" in card
    trainer.create_model_card(dataset="Blocks")
    saved = sum(file.stat().st_size for file in (tmp_path / "lora").glob("adapter_model.safetensors"))
    assert 0 < saved < 4 * sum(tensor.numel() for tensor in before.values())
    assert "| 0.25 |" in (tmp_path / "lora" / "README.md").read_text()
    merged = adapted.merge_and_unload()
    pixels = torch.stack([trainer.eval_dataset[0]["pixel_values"]])
    assert merged(pixels).logits.shape == (1, NUM_LABELS, 40, 56)


def test_the_card_and_the_push_carry_the_results(data, tmp_path, monkeypatch):
    pushed = []
    repository = SimpleNamespace(repo_id="me/blocks")
    monkeypatch.setattr(HfApi, "create_repo", lambda *arguments, **settings: repository)
    monkeypatch.setattr(HfApi, "upload_folder", lambda *arguments, **settings: pushed.append(settings))
    trainer = trainer_for(data, network(), tmp_path / "run", push_to_hub=True, hub_model_id="me/blocks", max_steps=2)
    trainer.train()
    found = {}
    for ratio in (1.0, 0.25):
        trainer.eval_keep_ratio = ratio
        found[ratio] = trainer.evaluate()
    trainer.push_to_hub(dataset="Blocks", license="cc0-1.0")
    assert pushed[-1]["repo_id"] == "me/blocks"
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.license == "cc0-1.0"
    listed = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert listed["Mean IoU (keep_ratio 0.25)"] == round(found[0.25]["eval_mean_iou"], 4)
    assert listed["Pixel accuracy (keep_ratio 1)"] == round(found[1.0]["eval_pixel_accuracy"], 4)
    assert {result.dataset_name for result in card.data.eval_results} == {"Blocks"}
    assert f"| 0.25 | {found[0.25]['eval_mean_iou']:.4f} |" in card.text
    assert "- steps: 2" in card.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "ailurus"


def test_adapted_models_of_transformers_train_too(data, tmp_path):
    """With logits of a quarter of the size, as BEiT's head gives them."""
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=8,
        num_labels=NUM_LABELS, sr_ratios=[2, 1, 1, 1],
    )  # fmt: skip
    loss = {"loss": SegmentationLoss(IGNORE)}
    plain = trainer_for(data, SegformerForSemanticSegmentation(config), tmp_path / "plain", max_steps=2, trainer=loss)
    plain.eval_keep_ratio = None
    plain.train()
    with pytest.raises(TypeError, match="merges no tokens, so it has no budget"):
        plain.evaluate()
    adapted = native()
    apply_ailurus(adapted, keep_ratio=0.5)
    trainer = trainer_for(
        data, adapted, tmp_path / "adapted", max_steps=4, trainer={"eval_keep_ratio": 0.25, "layer_decay": 0.9, **loss},
        callbacks=[KeepRatioSchedule([(0, 1.0), (0.5, 0.5)])],
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_keep_ratio"] == 0.25
    assert len(losses(trainer)) == 4
    trainer.create_model_card(dataset="Blocks")
    assert (tmp_path / "adapted" / "README.md").is_file()
