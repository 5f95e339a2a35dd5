"""Metrics against loops over pixels, hand-made cases, and as modules of the `evaluate` library."""

import math
import time

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EvalPrediction

from ailurus_hf.evaluation import (
    Agreement,
    BoundaryScore,
    ConfusionMatrix,
    DepthErrors,
    SegmentationMetrics,
    load_metric,
    predictions_from_logits,
)
from ailurus_hf.evaluation.accumulator import metric_names
from tests.reference import metrics as reference

NUM, IGNORE = 4, 9
CLASSES = {"num_labels": NUM, "ignore_index": IGNORE}
# Every metric of the package: what counts for it, with which settings. The tests that take a `metric` hold for all.
METRICS = {
    "agreement": (Agreement, {}),
    "boundary_f": (BoundaryScore, CLASSES),
    "depth": (DepthErrors, {"max_depth": 8.0}),
    "mean_iou": (ConfusionMatrix, CLASSES),
}
every_metric = pytest.mark.parametrize("metric", METRICS)


def pictures(seed, count=3, ignored=True, largest=9):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        shape = rng.integers(1, largest + 1, size=2)
        truth, prediction = rng.integers(NUM - 1, size=shape), rng.integers(NUM - 1, size=shape)
        if ignored:
            truth[rng.random(shape) < 0.2] = IGNORE
        found.append((prediction, truth))
    return found


def filled(counter, pairs):
    for prediction, truth in pairs:
        counter.update(torch.tensor(prediction), torch.tensor(truth))
    return counter


@given(st.integers(0, 10_000))
def test_confusion_equals_loops(seed):
    pairs = pictures(seed)
    matrix = filled(ConfusionMatrix(NUM, IGNORE), pairs)
    expected = reference.iou_by_class(pairs, NUM, IGNORE)
    np.testing.assert_allclose(matrix.iou(), expected)
    assert math.isnan(expected[-1])  # a class that never occurs does not count
    by_class, overall = reference.accuracy_by_class(pairs, NUM, IGNORE)
    np.testing.assert_allclose(matrix.class_accuracy(), by_class)
    np.testing.assert_allclose(matrix.pixel_accuracy(), overall)
    if matrix.counts.sum():
        assert matrix.mean_iou() == pytest.approx(np.nanmean(expected))


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3]))
def test_boundary_score_equals_loops(seed, tolerance):
    pairs = pictures(seed)
    score = filled(BoundaryScore(NUM, IGNORE, tolerance), pairs)
    np.testing.assert_allclose(score.f_score(), reference.boundary_f(pairs, NUM, IGNORE, tolerance))


@pytest.mark.parametrize("size", [(7, 90), (40, 33)])
def test_boundaries_at_larger_distances_equal_loops(size):
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(3, size=(-(-size[0] // 8), -(-size[1] // 8))), np.ones((8, 8), dtype=int))
    truth = truth[: size[0], : size[1]]
    truth[2:4, 5:20] = IGNORE
    pairs = [(np.roll(np.where(truth == IGNORE, 0, truth), 3, 1), truth)]
    for tolerance in (0.02, 0.05, 3 / math.hypot(*size), 5 / math.hypot(*size)):  # 5 is a distance between pixels
        score = filled(BoundaryScore(NUM, IGNORE, tolerance), pairs)
        np.testing.assert_allclose(score.f_score(), reference.boundary_f(pairs, NUM, IGNORE, tolerance))


def test_boundaries_of_many_classes_take_no_longer_with_the_radius():
    truth = torch.tensor(np.kron(np.random.default_rng(0).integers(19, size=(32, 64)), np.ones((8, 8), dtype=int)))
    seconds = {}
    for tolerance in (0.0075, 0.1):
        score = BoundaryScore(19, tolerance=tolerance)
        start = time.process_time()
        score.update(truth.roll(2, 1), truth)
        seconds[tolerance] = time.process_time() - start
        assert score.mean_f_score() > 0.99
    assert seconds[0.1] < 10 * seconds[0.0075]  # a disk of that radius has 180 times as many pixels


@given(st.integers(0, 10_000))
def test_depth_equals_loops(seed):
    rng = np.random.default_rng(seed)
    pairs = [(rng.uniform(-1, 20, (3, 5)), rng.uniform(0.2, 12, (3, 5))) for _ in range(3)]
    for _, truth in pairs:
        truth[0, :3] = [np.nan, 0, np.inf]
    found = filled(DepthErrors(0.1, 10.0), pairs).compute()
    assert found == pytest.approx(reference.depth_errors(pairs, 0.1, 10.0))


def empty(metric):
    accumulator, settings = METRICS[metric]
    return accumulator(**settings)


def scores(counter):
    """What `evaluate` gives for it, classes by number."""
    by_class = {f"{name}/{i}": x for name, values in counter.by_class().items() for i, x in enumerate(values.tolist())}
    return {**counter.compute(), **by_class}


@every_metric
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 6))
def test_parts_add_up_and_order_does_not_matter(metric, seed, cut):
    pairs = pictures(seed, 6)
    whole = filled(empty(metric), pairs)
    first, second = filled(empty(metric), pairs[:cut]), filled(empty(metric), pairs[cut:])
    torch.testing.assert_close(first.counts + second.counts, whole.counts)  # integers must be equal
    torch.testing.assert_close(filled(empty(metric), pairs[::-1]).counts, whole.counts)
    first.counts = first.counts + second.counts
    assert scores(first) == pytest.approx(scores(whole), nan_ok=True)


@every_metric
def test_nothing_is_no_number_and_reset_comes_back_to_it(metric):
    counter = filled(empty(metric), pictures(0))
    taken, before = counter.counts, counter.counts.clone()
    counter.reset()
    assert all(math.isnan(score) for score in scores(counter).values())
    assert torch.equal(counter.counts, empty(metric).counts)
    filled(counter, pictures(1))
    assert torch.equal(taken, before)


def test_hand_made_cases():
    matrix = ConfusionMatrix(3, 255)
    matrix.update(torch.tensor([[0]]), torch.tensor([[0]]))  # one pixel
    assert matrix.mean_iou() == matrix.pixel_accuracy() == 1
    matrix.update(torch.tensor([[1, 0]]), torch.tensor([[255, 255]]))  # all ignored: nothing changes
    assert matrix.counts.sum() == 1
    matrix.update(torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
    assert matrix.iou()[:2].tolist() == [0.5, 0.5]
    assert matrix.summary({0: "sky", 1: "road", 2: "cat"})["iou"] == {"sky": 0.5, "road": 0.5, "cat": None}
    bytes_ = torch.full((4,), 255, dtype=torch.uint8)
    matrix.update(torch.zeros_like(bytes_), bytes_)  # any shape and integer type
    assert matrix.counts.sum() == 3
    assert ConfusionMatrix(3).summary()["mean_iou"] is None


def test_hand_made_boundaries():
    truth = torch.zeros(1, 40, dtype=torch.int64)
    truth[:, 20:] = 1
    exact, near, far = (truth.roll(shift, 1) for shift in (0, 2, 8))
    near[:, :2] = far[:, :8] = 0

    def score(prediction):
        counter = BoundaryScore(2, tolerance=0.06)  # of 40 pixels: 2.4
        counter.update(prediction, truth)
        return counter.mean_f_score()

    assert (score(exact), score(near), score(far)) == (1, 1, 0)
    assert score(torch.zeros_like(truth)) == 0  # no boundary where there is one
    flat = BoundaryScore(2)
    flat.update(torch.zeros_like(truth), torch.zeros_like(truth))
    assert math.isnan(flat.mean_f_score())


def test_hand_made_depth():
    truth = torch.tensor([[1.0, 2.0, 4.0]])
    perfect = DepthErrors()
    perfect.update(truth, truth)
    assert perfect.compute() == {"abs_rel": 0, "rmse": 0, "rmse_log": 0, "delta1": 1, "delta2": 1, "delta3": 1}
    for align, prediction in (("median", 7 * truth), ("least_squares", 3 * truth + 2)):
        relative = DepthErrors(align=align)
        relative.update(prediction, truth)
        assert relative.compute()["rmse"] == pytest.approx(0, abs=1e-9)
    constant = DepthErrors(align="least_squares")
    constant.update(torch.full_like(truth, 5), truth)
    assert constant.compute()["rmse"] == pytest.approx(math.sqrt(14 / 9))
    unknown = DepthErrors()
    unknown.update(truth, torch.zeros_like(truth))
    assert all(math.isnan(value) for value in unknown.compute().values())


def test_disparity_is_scored_as_the_depth_it_means():
    """What Depth Anything and DPT predict: inverse depth up to scale and shift."""
    rng = np.random.default_rng(0)
    depth = torch.tensor(rng.uniform(1, 10, (24, 32)))
    disparity = 37 / depth - 1.5
    scores = {}
    for align in ("median", "least_squares", "disparity"):
        metric = load_metric("depth", align=align)
        scores[align] = metric.compute(predictions=[disparity], references=[depth])
    assert scores["disparity"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert scores["disparity"]["delta1"] == 1
    assert min(scores["median"]["abs_rel"], scores["least_squares"]["abs_rel"]) > 0.2
    truth = depth.clone()
    truth[:4] = torch.nan
    truth[4:6] = 0
    masked = DepthErrors(align="disparity")
    masked.update(disparity.where(truth > 0, 1e6), truth)  # what does not count has no part in the fit
    assert masked.compute()["rmse"] == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 10_000), st.sampled_from([None, 8.0]))
def test_disparity_equals_a_fit_by_numpy(seed, max_depth):
    rng = np.random.default_rng(seed)
    pairs = [(rng.uniform(-1, 20, (4, 5)), rng.uniform(0.2, 12, (4, 5))) for _ in range(2)]
    aligned = []
    for prediction, truth in pairs:
        counted = (truth > 0.1) & (truth <= (max_depth or np.inf))
        scale, shift = np.polyfit(prediction[counted], 1 / truth[counted], 1)
        farthest = max_depth or truth.max()
        aligned.append((1 / np.maximum(scale * prediction + shift, 1 / farthest), truth))
    found = filled(DepthErrors(0.1, max_depth, "disparity"), pairs).compute()
    assert found == pytest.approx(reference.depth_errors(aligned, 0.1, max_depth or np.inf))


def test_mistakes_are_explained():
    ones = torch.ones(2, 2, dtype=torch.int64)
    for counter in (ConfusionMatrix(2), BoundaryScore(2)):
        with pytest.raises(
            ValueError, match="labels must be classes from 0 to 1 or ignore_index=255, got values from 2"
        ):
            counter.update(ones, ones * 2)
        with pytest.raises(ValueError, match="predictions must be classes from 0 to 1, got values from 3 to 3"):
            counter.update(ones * 3, ones)
        with pytest.raises(ValueError, match="same shape"):
            counter.update(ones[:1], ones)
    with pytest.raises(ValueError, match=r"must both be \(height, width\), got \(2,\)"):
        BoundaryScore(2).update(ones[0], ones[0])
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        BoundaryScore(2, tolerance=-1)
    with pytest.raises(ValueError, match="align must be None"):
        DepthErrors(align="mean")
    with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
        DepthErrors(5, 1)
    with pytest.raises(ValueError, match="predictions must be finite"):
        DepthErrors().update(torch.tensor([[math.nan]]), torch.tensor([[1.0]]))
    with pytest.raises(ValueError, match="same shape"):
        Agreement().update(ones, ones[:1])


def test_no_metric_is_forgotten():
    assert metric_names() == sorted(METRICS)


@every_metric
def test_evaluate_gives_the_scores_of_the_counts(metric):
    pairs = pictures(1, 4)
    predictions, references = ([pair[index] for pair in pairs] for index in (0, 1))
    expected = pytest.approx(scores(filled(empty(metric), pairs)), rel=0, abs=0, nan_ok=True)
    loaded = load_metric(metric, **METRICS[metric][1])
    assert loaded.compute(predictions=predictions, references=references) == expected
    loaded.add(prediction=predictions[0].tolist(), reference=references[0].tolist())
    loaded.add_batch(predictions=predictions[1:], references=references[1:])
    assert loaded.compute() == expected  # the first pictures are no longer among them
    assert (METRICS[metric][0].__doc__ or "").split(".")[0] in loaded.description


def test_evaluate_names_the_classes():
    metric = load_metric("mean_iou", **CLASSES, id2label={0: "a", 1: "b", 2: "c", 3: "d"})
    found = metric.compute(predictions=[[[0, 1]]], references=[[[0, 0]]])
    assert (found["iou/a"], found["iou/b"], found["mean_iou"]) == (0.5, 0, 0.25)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({0: "a", 2: "c"}, ["a", "LABEL_1", "c", "LABEL_3"]),
        ({"0": "a", "1": "b", "2": "c", "3": "d"}, ["a", "b", "c", "d"]),
        ({0: "wall", 1: "b", 2: "wall", 3: "d"}, ["wall (0)", "b", "wall (2)", "d"]),
    ],
)
def test_no_class_is_lost_for_its_name(names, expected):
    metric = load_metric("mean_iou", **CLASSES, id2label=names)
    found = metric.compute(predictions=[[[0, 1, 2, 3]]], references=[[[0, 1, 2, 3]]])
    assert [key.removeprefix("iou/") for key in found if key.startswith("iou/")] == expected
    assert list(ConfusionMatrix(**CLASSES).summary(names)["iou"]) == expected
    trainer = SegmentationMetrics(NUM, IGNORE, names)
    labels = np.zeros((1, 2, 2), dtype=int)
    assert [key[4:] for key in trainer(EvalPrediction(labels, labels)) if key.startswith("iou_")] == expected


def test_evaluate_modules_combine_and_keep_nothing_on_disk(tmp_path, monkeypatch):
    both = evaluate.combine([load_metric(name, **CLASSES) for name in ("mean_iou", "boundary_f")])
    prediction, truth = pictures(2, 1)[0]
    both.add_batch(predictions=[prediction], references=[truth])
    assert {"mean_iou", "boundary_f"} <= both.compute().keys()
    metric = load_metric("mean_iou", num_labels=NUM, cache_dir=str(tmp_path))
    metric.compute(predictions=[np.zeros((64, 64), dtype=int)], references=[np.zeros((64, 64), dtype=int)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_evaluate_modules_explain_mistakes():
    with pytest.raises(ValueError, match="name must be one of agreement, boundary_f, depth, mean_iou, got 'dice'"):
        load_metric("dice")
    with pytest.raises(ValueError, match="num_process must be 1, got 2"):
        load_metric("agreement", num_process=2)
    metric = load_metric("agreement")
    with pytest.raises(TypeError, match="unknown argument num_labels"):
        metric.compute(predictions=[], references=[], num_labels=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_labels'"):
        load_metric("agreement", num_labels=3)
    with pytest.raises(ValueError, match="a reference for each of the 1 predictions, got 2"):
        metric.add_batch(predictions=[[[1]]], references=[[[1]], [[1]]])


def test_trainer_metrics_stream_over_batches():
    pairs = pictures(3, 5, largest=1)
    metrics = SegmentationMetrics(NUM, IGNORE, {0: "a", 1: "b", 2: "c", 3: "d"})
    for number, (prediction, truth) in enumerate(pairs):
        filling = np.full_like(truth, -100)
        batch = EvalPrediction(np.stack([prediction, filling]), np.stack([truth, filling]))
        found = metrics(batch, compute_result=number == 4)
    matrix = filled(ConfusionMatrix(NUM, IGNORE), pairs)
    assert found["pixel_accuracy"] == matrix.pixel_accuracy()
    assert found["iou_a"] == pytest.approx(matrix.iou()[0].item(), nan_ok=True)
    assert metrics.matrix.counts.sum() == 0


def test_logits_become_label_maps_of_the_labels_size():
    logits = torch.randn(2, 3, 4, 5)
    assert torch.equal(predictions_from_logits((logits, None), torch.zeros(2, 4, 5)), logits.argmax(1))
    assert predictions_from_logits(logits, torch.zeros(2, 8, 10)).shape == (2, 8, 10)
