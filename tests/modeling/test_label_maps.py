"""Binary segmentation with one channel: loss, classes, names, and the same answer from every part of the package."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainingArguments, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput

from ailurus_hf import (
    AiluRusConfig,
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusSegformerConfig,
    AiluRusSegformerForSemanticSegmentation,
)
from ailurus_hf.cli.app import main
from ailurus_hf.data import SegmentationCollator, SegmentationDataset, SegmentationFolder
from ailurus_hf.evaluation import ConfusionMatrix, class_scores, evaluate_segmentation, load_metric, segment_image
from ailurus_hf.modeling.label_maps import class_names, labels_of_logits, num_classes
from ailurus_hf.training import SegmentationLoss, SegmentationTrainer
from ailurus_hf.visualization import model_palette
from tests.data.files import IGNORE, labelled_picture, write_labels
from tests.factories import random_images, tiny_model, tiny_segformer

KINDS = ["ailurus", "upsampling", "segformer"]
NAMES = {"num_labels": 1, "id2label": {0: "flood"}, "label2id": {"flood": 0}}
PROCESSOR = AiluRusImageProcessor()


def network(kind: str = "ailurus", **settings: Any) -> Any:
    settings = {**NAMES, "semantic_loss_ignore_index": IGNORE, **settings}
    if kind == "segformer":
        return tiny_segformer(AiluRusSegformerForSemanticSegmentation, **settings)
    head = {"decoder_type": "progressive_upsampling"} if kind == "upsampling" else {}
    return tiny_model(AiluRusForSemanticSegmentation, **settings, **head)


def labels_for(images: torch.Tensor) -> torch.Tensor:
    labels = torch.randint(0, 2, (len(images), *images.shape[-2:]), generator=torch.Generator().manual_seed(1))
    labels[:, :5] = IGNORE
    labels[:, 5:7] = -100
    return labels


def write_pictures(root: Path, count: int = 3) -> SegmentationFolder:
    """Pictures whose foreground is what is labelled 2 or 3 elsewhere."""
    for number in range(count):
        image, labels = labelled_picture(number)
        (root / "images").mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / f"{number}.png")
        write_labels(root / "labels" / f"{number}.png", np.where(labels == IGNORE, IGNORE, labels // 2))
    return SegmentationFolder([(file, root / "labels" / file.name) for file in sorted((root / "images").iterdir())])


class TestLoss:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_a_model(self, kind: str) -> None:
        images, model = random_images(2, 64, 72), network(kind)
        labels = labels_for(images)
        output = model(images, labels=labels)
        assert output.logits.shape == (2, 1, 64, 72)
        total = 0.0
        for logit, label in zip(output.logits.detach().flatten().tolist(), labels.flatten().tolist(), strict=True):
            if label in (0, 1):
                total += math.log1p(math.exp(-logit if label else logit))
        assert output.loss.item() == pytest.approx(total / labels.numel(), rel=1e-5)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_is_that_of_transformers(self) -> None:
        """With a head that is linear in its last map, at the size of the logits."""
        native = SegformerForSemanticSegmentation(SegformerConfig(num_labels=1, semantic_loss_ignore_index=IGNORE))
        native.eval()
        images = random_images(2, 64, 64)
        labels = labels_for(images)
        with torch.no_grad():
            expected = native(images, labels=labels)
            logits = F.interpolate(expected.logits, size=(64, 64), mode="bilinear", align_corners=False)
            head = network("segformer")
            head.segformer.forward = lambda *args, **kwargs: _Maps()
            head.decode_head.forward = lambda maps: expected.logits
            found = head(images, labels=labels)
        assert torch.equal(found.logits, logits)
        assert found.loss == expected.loss

    @pytest.mark.parametrize("label", [2, 255])
    def test_labels_of_more_classes_are_refused(self, label: int) -> None:
        images = random_images(1)
        labels = labels_for(images).fill_(label)
        with pytest.raises(ValueError, match=f"must be 0, 1 or ignore_index={IGNORE}, got {label}; set num_labels"):
            network()(images, labels=labels)
        with pytest.raises(ValueError, match="set num_labels"):
            SegmentationLoss(IGNORE)(network()(images), labels)

    @pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 3.0])])
    def test_of_training_is_the_mean_of_the_pixels_that_count(self, weight: torch.Tensor | None) -> None:
        images, loss = random_images(2, 48, 48), SegmentationLoss(IGNORE, weight)
        labels = labels_for(images)
        labels[labels == -100] = IGNORE
        logits = network()(images).logits.requires_grad_()
        # Two channels, 0 and the logit, are the same softmax.
        both = torch.cat([torch.zeros_like(logits), logits], dim=1)
        expected = F.cross_entropy(both, labels, weight, ignore_index=IGNORE)
        found = loss(SemanticSegmenterOutput(logits=logits), labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


class _Maps(dict[str, Any]):
    hidden_states: tuple[Any, ...] = ()
    attentions = assignment = group_sizes = None


class TestClasses:
    @pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9])
    def test_above_the_threshold(self, threshold: float) -> None:
        logits = torch.randn(2, 1, 5, 7)
        expected = (logits[:, 0].sigmoid() > threshold).long()
        assert torch.equal(labels_of_logits(logits, threshold), expected)
        assert torch.equal(labels_of_logits(logits[0], threshold), expected[0])
        processor = AiluRusImageProcessor(binary_threshold=threshold)
        found = processor.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits))
        assert torch.equal(torch.stack(found), expected)

    def test_more_channels_as_before(self) -> None:
        logits = torch.randn(2, 3, 5, 7)
        assert torch.equal(labels_of_logits(logits, 0.3), logits.argmax(1))

    @pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, float("nan")])
    @pytest.mark.parametrize("config_class", [AiluRusConfig, AiluRusSegformerConfig])
    def test_thresholds_that_are_none(self, config_class: Any, threshold: float) -> None:
        with pytest.raises(Exception, match="must be above 0 and below 1"):
            config_class(binary_threshold=threshold)

    @pytest.mark.parametrize("kind", KINDS)
    def test_names(self, kind: str, tmp_path: Path) -> None:
        model = network(kind)
        for config in (model.config, _reloaded(model, tmp_path).config):
            assert (config.num_labels, num_classes(config)) == (1, 2)
            assert dict(config.id2label) == {1: "flood"}
            assert [config.id2label[0], config.id2label[1]] == ["background", "flood"]
            assert class_names(config.id2label, config.num_labels) == ["background", "flood"]
            assert model_palette(config).shape == (2, 3)
            with pytest.raises(KeyError):
                config.id2label[2]

    def test_colours(self) -> None:
        assert model_palette(network(palette=[[9, 8, 7]]).config).tolist() == [[0, 0, 0], [9, 8, 7]]

    def test_a_mask_transformer_needs_two_classes(self) -> None:
        with pytest.raises(ValueError, match=r"num_labels must be at least 2 for decode_head\.type='mask_transformer'"):
            network(decoder_type="mask_transformer")


def _reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "saved")
    return type(model).from_pretrained(folder / "saved")


class TestEveryPartAgrees:
    """Label maps of the pipeline, `segment_image`, `predict`, `evaluate` and Trainer are those of the formula."""

    @pytest.mark.parametrize(
        ("kind", "threshold"),
        [*((kind, 0.5) for kind in KINDS), ("ailurus", 0.6), ("upsampling", 0.6), ("segformer", 0.35)],
    )
    def test_agreement(self, kind: str, threshold: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        samples = write_pictures(tmp_path)
        model = network(kind, binary_threshold=threshold, keep_ratio=1.0)
        processor = AiluRusImageProcessor(binary_threshold=threshold)
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        matrix, expected = ConfusionMatrix(2, IGNORE), []
        for sample in samples:
            with torch.no_grad():
                logits = model(processor(sample.image, return_tensors="pt")["pixel_values"]).logits
            expected.append((logits[0, 0].sigmoid() > threshold).long())
            matrix.update(expected[-1], torch.as_tensor(sample.labels))
        assert all(0 < labels.float().mean() < 1 for labels in expected), "both classes must occur"

        assert all(
            np.array_equal(segment_image(model, processor, sample.image).labels, labels)
            for sample, labels in zip(samples, expected, strict=True)
        )
        report = evaluate_segmentation(model, processor, samples, (1.0,), progress=False, boundary=True)
        assert torch.equal(report.budgets[0].confusion.counts, matrix.counts)
        assert list(report.to_dict()["budgets"][0]["iou"]) == ["background", "flood"]

        trainer = SegmentationTrainer(
            model,
            TrainingArguments(
                str(tmp_path / "run"), per_device_eval_batch_size=1, use_cpu=True, report_to="none", disable_tqdm=True
            ),
            eval_dataset=SegmentationDataset(samples, processor, ignore_index=IGNORE),
            data_collator=SegmentationCollator(IGNORE),
        )
        scores = trainer.evaluate()
        assert scores["eval_mean_iou"] == matrix.mean_iou()
        assert scores["eval_pixel_accuracy"] == matrix.pixel_accuracy()

        found = pipeline("image-segmentation", model=str(tmp_path / "model"))(samples[0].image)
        assert [entry["label"] for entry in found] == ["background", "flood"]
        assert np.array_equal(np.asarray(found[1]["mask"]) > 0, expected[0].bool())

        capfd.readouterr()
        folder = str(tmp_path / "model")
        options = ["--device", "cpu", "--json"]
        assert (
            main(["predict", str(tmp_path / "images"), "--model", folder, "--out", str(tmp_path / "p"), *options]) == 0
        )
        (first, *_) = json.loads(capfd.readouterr().out)
        assert {entry["id"]: entry["name"] for entry in first["classes"]} == {0: "background", 1: "flood"}
        with Image.open(tmp_path / "p" / "0.labels.png") as picture:
            assert np.array_equal(np.asarray(picture), expected[0])
        places = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
        assert main(["evaluate", "--model", folder, *places, "--keep-ratio", "1", *options]) == 0
        assert json.loads(capfd.readouterr().out)["budgets"][0]["mean_iou"] == matrix.mean_iou()

    @pytest.mark.parametrize("threshold", [0.5, 0.35])
    def test_several_views(self, threshold: float) -> None:
        """Probabilities are averaged, and the threshold is one of probabilities."""
        model, (image, _) = network(binary_threshold=threshold), labelled_picture(0)
        pixel_values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            views = [model(pixel_values).logits.sigmoid(), model(pixel_values.flip(-1)).logits.flip(-1).sigmoid()]
        mean = sum(views) / 2
        scores = class_scores(model, pixel_values, flip=True)
        assert (scores - mean).abs().max() <= 1e-6
        found = segment_image(model, PROCESSOR, image, flip=True).labels
        clear = (mean[0, 0] - threshold).abs() > 1e-5
        assert np.array_equal(found[clear], (mean[0, 0] > threshold).long()[clear])

    def test_foreign_models(self, tmp_path: Path) -> None:
        """Models of transformers, whose `id2label` names class 0."""
        samples = write_pictures(tmp_path, 1)
        torch.manual_seed(0)
        native = SegformerForSemanticSegmentation(SegformerConfig(num_labels=1, semantic_loss_ignore_index=IGNORE))
        report = evaluate_segmentation(native, PROCESSOR, samples, (1.0,), progress=False)
        assert list(report.id2label.values()) == ["background", "LABEL_0"]

    def test_training_learns_it(self, tmp_path: Path) -> None:
        samples = write_pictures(tmp_path, 4)
        data = SegmentationDataset(samples, PROCESSOR, ignore_index=IGNORE)
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=60, learning_rate=3e-3, per_device_train_batch_size=4, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", seed=1, per_device_eval_batch_size=1,
        )  # fmt: skip
        trainer = SegmentationTrainer(network(), arguments, train_dataset=data, eval_dataset=data)
        before = trainer.evaluate()["eval_mean_iou"]
        trainer.train()
        after = trainer.evaluate()["eval_mean_iou"]
        assert after > max(before, 0.8)


@pytest.mark.parametrize("name", ["mean_iou", "boundary_f"])
@pytest.mark.parametrize("id2label", [None, {0: "flood"}, {1: "flood"}])
def test_metrics_count_both_classes_of_one_channel(name: str, id2label: dict[int, str] | None) -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    metric = load_metric(name, num_labels=1, id2label=id2label)
    metric.add(prediction=labels, reference=labels)
    found = {key.partition("/")[2]: value for key, value in metric.compute().items() if "/" in key}
    assert found == dict.fromkeys(["0", "1"] if id2label is None else ["background", "flood"], 1.0)


def test_one_name_for_two_classes_is_the_foreground() -> None:
    assert class_names({0: "flood"}, 1) == class_names({1: "flood"}, 2) == ["background", "flood"]
    assert class_names(None, 1) == ["0", "1"]
    assert class_names({0: "a", 2: "b"}, 3) == ["a", "LABEL_1", "b"]
