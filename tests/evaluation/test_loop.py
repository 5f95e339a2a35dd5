"""Evaluating at several budgets: the same as one picture after the other by hand.

On several processes: tests/training/test_processes.py.
"""

import json

import numpy as np
import pytest
import torch
from transformers import (
    BeitConfig,
    Dinov2Config,
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ailurus_hf import (
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    AiluRusSegformerForSemanticSegmentation,
    LookupViTForSemanticSegmentation,
    apply_ailurus,
)
from ailurus_hf.data import SegmentationFolder
from ailurus_hf.data.images import ImageFileError
from ailurus_hf.evaluation import ConfusionMatrix, class_scores, evaluate_segmentation, segment_image
from ailurus_hf.evaluation.inference import class_logits
from tests.data.files import IGNORE, NUM_LABELS, write_camvid, write_labels
from tests.factories import random_images, tiny_lookupvit, tiny_model, tiny_segformer

PROCESSOR = AiluRusImageProcessor()


def network(**settings):
    return tiny_model(
        AiluRusForSemanticSegmentation, num_labels=NUM_LABELS, semantic_loss_ignore_index=IGNORE, **settings
    )


@pytest.fixture
def samples(tmp_path):
    return SegmentationFolder.camvid(write_camvid(tmp_path / "data", val=3), "val")


def test_every_budget_equals_a_loop(samples):
    model = network(num_clusters=3)
    report = evaluate_segmentation(model, PROCESSOR, samples, (0.5, 0.25), boundary=True, progress=False)
    assert [result.keep_ratio for result in report.budgets] == [1, 0.5, 0.25]
    dense = [segment_image(network(keep_ratio=1), PROCESSOR, sample.image).labels for sample in samples]
    for result in report.budgets:
        matrix, equal = ConfusionMatrix(NUM_LABELS, IGNORE), []
        for sample, labels in zip(samples, dense, strict=True):
            found = segment_image(network(keep_ratio=result.keep_ratio), PROCESSOR, sample.image).labels
            matrix.update(torch.tensor(found), torch.tensor(sample.labels))
            equal.append((found == labels).mean())
        assert torch.equal(result.confusion.counts, matrix.counts)
        assert result.agreement.share() == pytest.approx(np.mean(equal))
        assert len(result.seconds) == 3
    assert report.budgets[0].gflops > report.budgets[1].gflops > report.budgets[2].gflops
    assert (model.config.num_clusters, model.config.keep_ratio) == (3, 0.5)  # as it was
    rows = report.rows()
    assert rows[0]["speed_up"] == rows[0]["agreement"] == 1
    assert json.loads(json.dumps(report.to_dict()))["budgets"][2]["iou"].keys() == {*report.id2label.values()}


def test_methods_side_by_side_with_intervals(samples):
    budgets = [{"keep_ratio": 0.5, "grouping": name} for name in ("region_merging", "density_peaks")]
    report = evaluate_segmentation(network(), PROCESSOR, samples, [1, *budgets], intervals=True, progress=False)
    rows = report.rows()
    assert [(row["keep_ratio"], row["grouping"]) for row in rows] == [
        (1, None), (0.5, "region_merging"), (0.5, "density_peaks")]  # fmt: skip
    assert len({row["mean_iou"] for row in rows}) == 3
    rng, drawn = np.random.default_rng(0), []
    for counts in rng.multinomial(3, [1 / 3] * 3, size=2000):  # resample by resample
        scores = []
        for result in (report.budgets[1], report.budgets[0]):
            matrix = ConfusionMatrix(NUM_LABELS, IGNORE)
            for times, (confusion, _) in zip(counts, result.per_picture, strict=True):
                matrix.counts += torch.as_tensor(int(times) * confusion)
            scores.append(matrix.mean_iou())
        drawn.append(scores[0] - scores[1])
    found = report.intervals(report.budgets[1])
    assert found["mean_iou_difference"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)))
    low, high = found["agreement"]
    assert low <= rows[1]["agreement"] <= high
    assert report.intervals(report.budgets[0]) == {"mean_iou_difference": (0, 0), "agreement": (1, 1)}
    [dense] = evaluate_segmentation(network(), PROCESSOR, samples, [], progress=False).budgets
    assert dense.keep_ratio == 1
    assert "agreement_low" not in evaluate_segmentation(network(), PROCESSOR, samples, progress=False).rows()[1]


def test_compressed_sizes_with_the_largest_in_the_place_of_dense(samples):
    settings = {"num_labels": NUM_LABELS, "semantic_loss_ignore_index": IGNORE, "compressed_sizes": (1, 2, 3, 9)}
    model = tiny_lookupvit(LookupViTForSemanticSegmentation, **settings)
    budgets = [{"compressed_size": size} for size in (1, (1, 3), 2, (2, 2))]
    report = evaluate_segmentation(model, PROCESSOR, samples, budgets, progress=False)
    sizes = [(2, 2), (1, 3), (1, 1)]
    assert [result.budget for result in report.budgets] == [{"compressed_size": size} for size in sizes]
    assert [row["compressed_size"] for row in report.rows()] == ["2 x 2", "1 x 3", "1 x 1"]
    found = []
    for size in sizes:
        model.config.compressed_size = size
        found.append([segment_image(model, PROCESSOR, sample.image).labels for sample in samples])
    for result, labels in zip(report.budgets, found, strict=True):
        equal = [(one == other).mean() for one, other in zip(labels, found[0], strict=True)]
        assert result.agreement.share() == pytest.approx(np.mean(equal))
    gflops = [result.gflops for result in report.budgets]
    assert gflops == sorted(set(gflops), reverse=True)
    with pytest.raises(TypeError, match="has no setting 'keep_ratio'"):
        evaluate_segmentation(model, PROCESSOR, samples, (1, 0.5), progress=False)
    with pytest.raises(TypeError, match="has no setting 'compressed_size'"):
        evaluate_segmentation(network(), PROCESSOR, samples, [{"compressed_size": 2}], progress=False)


def test_hierarchical_models(samples):
    model = tiny_segformer(AiluRusSegformerForSemanticSegmentation, num_labels=NUM_LABELS)
    report = evaluate_segmentation(model, PROCESSOR, samples, (0.5,), ignore_index=IGNORE, progress=False)
    assert report.budgets[1].agreement.share() < 1


def native():
    backbone = BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, patch_size=8, image_size=64,
        intermediate_size=64, out_indices=[1, 2, 3, 4],
    )  # fmt: skip
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=NUM_LABELS
    )
    return UperNetForSemanticSegmentation(config).eval()


def test_models_of_transformers(samples):
    plain = evaluate_segmentation(native(), PROCESSOR, samples, (1,), ignore_index=IGNORE, progress=False)
    model = apply_ailurus(native(), keep_ratio=0.5)
    adapted = evaluate_segmentation(model, PROCESSOR, samples, (0.25,), ignore_index=IGNORE, progress=False)
    assert torch.equal(adapted.budgets[0].confusion.counts, plain.budgets[0].confusion.counts)
    assert adapted.budgets[1].agreement.share() < 1
    assert plain.rows()[0]["gflops"] is None
    assert model.config.ailurus["keep_ratio"] == 0.5
    with pytest.raises(TypeError, match="call apply_ailurus"):
        evaluate_segmentation(native(), PROCESSOR, samples, (0.5,), ignore_index=IGNORE, progress=False)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "image_size": 64}


def eomt():
    config = EomtConfig(**SHAPE, mlp_ratio=2, num_blocks=1, num_queries=6, num_upscale_blocks=1, num_labels=NUM_LABELS)
    return EomtForUniversalSegmentation(config)


def mask2former():
    backbone = Dinov2Config(**SHAPE, mlp_ratio=2, out_indices=[1, 2, 3, 4])
    sides = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 32, "num_attention_heads": 2}
    config = Mask2FormerConfig(backbone_config=backbone, **sides, **layers, num_queries=5, num_labels=NUM_LABELS)
    return Mask2FormerForUniversalSegmentation(config)


@pytest.mark.parametrize("make", [eomt, mask2former])
def test_models_that_classify_masks(make, samples):
    torch.manual_seed(0)
    model = apply_ailurus(make().eval(), keep_ratio=0.25)

    def to_square(image, return_tensors):  # EoMT takes no other
        return PROCESSOR(image.resize((64, 64)), return_tensors=return_tensors)

    report = evaluate_segmentation(model, to_square, samples, (1, 0.25), ignore_index=IGNORE, progress=False)
    assert [result.keep_ratio for result in report.budgets] == [1, 0.25]
    with torch.no_grad():
        output = model(random_images(2, 64, 64))
    found = class_logits(output)
    expected = [
        sum(scores.softmax(-1)[label] * mask.sigmoid() for scores, mask in zip(*queries, strict=True))
        for queries in zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
        for label in range(NUM_LABELS)
    ]
    torch.testing.assert_close(found.exp().flatten(0, 1), torch.stack(expected))


def test_views_are_averaged():
    model, pixels = network(keep_ratio=0.5), random_images(2, 40, 56)
    with torch.no_grad():
        logits = model(pixels).logits
        mirrored = model(pixels.flip(-1)).logits.flip(-1)
        small = torch.nn.functional.interpolate(pixels, size=(20, 28), mode="bilinear")
        shrunk = torch.nn.functional.interpolate(model(small).logits, size=(40, 56), mode="bilinear")
    assert torch.equal(class_scores(model, pixels), logits)
    expected = (logits.softmax(1) + mirrored.softmax(1)) / 2
    torch.testing.assert_close(class_scores(model, pixels, flip=True), expected)
    expected = (logits.softmax(1) + shrunk.softmax(1)) / 2
    torch.testing.assert_close(class_scores(model, pixels, scales=(1, 0.5)), expected)
    assert class_scores(model, pixels, (80, 30), flip=True, scales=(0.5, 2)).shape == (2, NUM_LABELS, 80, 30)
    with pytest.raises(ValueError, match="scales must be one or more numbers above 0"):
        class_scores(model, pixels, scales=(0,))
    with pytest.raises(ValueError, match="sliding_window needs"):
        class_scores(model, pixels, sliding_window=True)


def test_views_of_a_picture(samples):
    model, image = network(keep_ratio=0.5, window_size=32), samples[0].image
    pixels = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    for views in ({"flip": True}, {"scales": (0.5, 1)}, {"sliding_window": True, "flip": True}):
        found = segment_image(model, PROCESSOR, image, **views)
        np.testing.assert_array_equal(found.labels, class_scores(model, pixels, **views)[0].argmax(0))
        assert found.clusters is None


def test_broken_samples(tmp_path, samples):
    with pytest.raises(ValueError, match="at least one picture"):
        evaluate_segmentation(network(), PROCESSOR, [])
    file = samples.pairs[1][0]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ImageFileError, match=file.name):
        evaluate_segmentation(network(), PROCESSOR, samples, progress=False)
    report = evaluate_segmentation(network(), PROCESSOR, samples, (1,), skip_unreadable=True, progress=False)
    assert report.num_pictures == 2
    assert file.name in report.skipped[0]
    write_labels(samples.pairs[2][1], np.full((40, 56), 7))
    samples.rule.num_labels = None
    with pytest.raises(ValueError, match=r"002\.png: labels must be classes from 0 to 3"):
        evaluate_segmentation(network(), PROCESSOR, samples, (1,), skip_unreadable=True, progress=False)
    for picture, _ in samples.pairs:
        picture.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 3 samples could be read"):
        evaluate_segmentation(network(), PROCESSOR, samples, (1,), skip_unreadable=True, progress=False)
