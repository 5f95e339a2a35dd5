"""Depth quality: errors of every picture, averaged over pictures."""

import torch
from torch import Tensor

from .accumulator import Accumulator
from .segmentation import check_shapes

__all__ = ["DepthErrors"]

NAMES = ("abs_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")


class DepthErrors(Accumulator):
    """The usual errors of predicted depth (Eigen et al., NeurIPS 2014, section 4.3), added up picture by picture.

    With prediction p and truth t over the pixels that count: `abs_rel` = mean |p - t| / t, `rmse` = root of the mean
    (p - t)^2, `rmse_log` the same of logarithms, `delta1` to `delta3` = share of pixels with max(p / t, t / p) below
    1.25, 1.25^2, 1.25^3. Pixels count where the truth is finite, above `min_depth` and at most `max_depth`.

    Args:
        min_depth: smallest depth that counts, in the unit of the maps; predictions are raised to it.
        max_depth: largest depth that counts; predictions are lowered to it. None for no limit.
        align: for models whose depth is only relative, per picture and over the pixels that count. "median" scales the
            prediction by the ratio of the medians; "least_squares" fits scale and shift to the depth. "disparity" is
            for predictions of inverse depth, larger where nearer, such as those of Depth Anything and DPT (MiDaS):
            scale and shift are fitted to 1 / depth, and the errors are those of the inverse (Ranftl et al., TPAMI 2022,
            section 5). None takes predictions as they are.

    Raises:
        ValueError: `min_depth` is not above 0, `max_depth` not above it, or `align` is unknown.
    """

    def __init__(self, min_depth: float = 1e-3, max_depth: float | None = None, align: str | None = None) -> None:
        if not min_depth > 0 or (max_depth is not None and not max_depth > min_depth):
            raise ValueError(f"0 < min_depth < max_depth is needed, got {min_depth} and {max_depth}")
        if align not in (None, "median", "least_squares", "disparity"):
            raise ValueError(f"align must be None, 'median', 'least_squares' or 'disparity', got {align!r}")
        self.min_depth, self.max_depth, self.align = min_depth, max_depth, align
        self.counts = torch.zeros(len(NAMES) + 1, dtype=torch.float64)  # sums of the errors, number of pictures

    def update(self, predictions: Tensor, references: Tensor) -> None:
        """Add one picture; one without any pixel that counts is left out.

        Args:
            predictions: (height, width) predicted depth, or inverse depth where `align` is "disparity".
            references: (height, width) true depth; 0, NaN or infinity where it is unknown.

        Raises:
            ValueError: the shapes differ, or a prediction that counts is not finite.
        """
        check_shapes(predictions, references, "references")
        truth = references.double().cpu()
        counted = truth.isfinite() & (truth > self.min_depth)
        if self.max_depth is not None:
            counted &= truth <= self.max_depth
        predicted, truth = predictions.double().cpu()[counted], truth[counted]
        if not truth.numel():
            return
        if not predicted.isfinite().all():
            raise ValueError("predictions must be finite where the depth is known, got NaN or infinity")
        errors = _errors(self._aligned(predicted, truth).clamp(self.min_depth, self.max_depth), truth)
        self.counts += torch.cat([errors, errors.new_ones(1)])

    def compute(self) -> dict[str, float]:
        """Mean over the pictures of every error, by name; NaN if there were none."""
        return dict(zip(NAMES, (self.counts[:-1] / self.counts[-1]).tolist(), strict=True))

    def _aligned(self, predicted: Tensor, truth: Tensor) -> Tensor:
        if self.align == "median":
            return predicted * (truth.median() / predicted.median())
        if self.align == "least_squares":
            return _fitted(predicted, truth)
        if self.align == "disparity":
            # A line may reach 0 or less, where there is no depth: that is as far as anything is.
            farthest = truth.max() if self.max_depth is None else truth.new_tensor(self.max_depth)
            return 1 / torch.maximum(_fitted(predicted, 1 / truth), 1 / farthest)
        return predicted


def _fitted(predicted: Tensor, truth: Tensor) -> Tensor:
    """The prediction with the scale and shift of the smallest squared error."""
    columns = torch.stack([predicted, torch.ones_like(predicted)], dim=1)
    # lstsq's default driver assumes full rank, which a constant prediction has not.
    scale, shift = torch.linalg.pinv(columns) @ truth
    return scale * predicted + shift


def _errors(predicted: Tensor, truth: Tensor) -> Tensor:
    difference, ratio = predicted - truth, torch.maximum(predicted / truth, truth / predicted)
    logs = predicted.log() - truth.log()
    within = [(ratio < 1.25**power).double().mean() for power in (1, 2, 3)]
    return torch.stack(
        [(difference.abs() / truth).mean(), difference.square().mean().sqrt(), logs.square().mean().sqrt(), *within]
    )
