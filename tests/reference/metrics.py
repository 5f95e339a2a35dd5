"""Metrics as loops over pixels."""

import math

import numpy as np


def iou_by_class(pictures, num_labels, ignore_index):
    """IoU of every class over (prediction, truth) pictures; NaN where a class is in neither."""
    result = []
    for label in range(num_labels):
        inside = union = 0
        for prediction, truth in pictures:
            for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
                if t == ignore_index:
                    continue
                inside += p == label and t == label
                union += p == label or t == label
        result.append(inside / union if union else math.nan)
    return result


def accuracy_by_class(pictures, num_labels, ignore_index):
    """Share of right pixels of every class and over all; NaN where there are none."""
    right, count = np.zeros(num_labels), np.zeros(num_labels)
    for prediction, truth in pictures:
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            if t != ignore_index:
                right[t] += p == t
                count[t] += 1
    with np.errstate(invalid="ignore"):
        return right / count, right.sum() / count.sum()


def boundary_pixels(labels, label, ignore_index):
    """Pixels of a class with a counted pixel of another class above, below, left or right."""
    height, width = labels.shape
    found = []
    for y in range(height):
        for x in range(width):
            if labels[y, x] != label:
                continue
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            values = [labels[v, u] for v, u in around if 0 <= v < height and 0 <= u < width]
            if any(value not in (label, ignore_index) for value in values):
                found.append((y, x))
    return found


def boundary_f(pictures, num_labels, ignore_index, tolerance):
    """Boundary F-score of every class."""
    scores = []
    for label in range(num_labels):
        met = predicted_count = found = true_count = 0
        for prediction, truth in pictures:
            radius = max(tolerance * math.hypot(*truth.shape), 1)
            prediction = np.where(truth == ignore_index, ignore_index, prediction)
            predicted, true = (boundary_pixels(labels, label, ignore_index) for labels in (prediction, truth))
            met += sum(any(math.dist(p, t) <= radius for t in true) for p in predicted)
            found += sum(any(math.dist(p, t) <= radius for p in predicted) for t in true)
            predicted_count += len(predicted)
            true_count += len(true)
        if predicted_count + true_count == 0:
            scores.append(math.nan)
            continue
        precision, recall = met / max(predicted_count, 1), found / max(true_count, 1)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return scores


def depth_errors(pictures, low, high):
    """Errors of every picture, averaged over those with a known pixel."""
    names = ("abs_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")
    rows = []
    for prediction, truth in pictures:
        pairs = [
            (min(max(p, low), high), t)
            for p, t in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True)
            if math.isfinite(t) and low < t <= high
        ]
        if not pairs:
            continue
        count = len(pairs)
        ratios = [max(p / t, t / p) for p, t in pairs]
        rows.append(
            [
                sum(abs(p - t) / t for p, t in pairs) / count,
                math.sqrt(sum((p - t) ** 2 for p, t in pairs) / count),
                math.sqrt(sum((math.log(p) - math.log(t)) ** 2 for p, t in pairs) / count),
                *(sum(ratio < 1.25**power for ratio in ratios) / count for power in (1, 2, 3)),
            ]
        )
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
