"""From logits to classes, in one place.

A model with `num_labels=1` segments two classes with one channel: a pixel is class 1, the foreground, where the
sigmoid of its logit is above a threshold, and class 0, the background, elsewhere. `id2label` then names the foreground
alone.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND = "background"


class ForegroundName(dict[int, str]):
    """`id2label` of a model with one channel, {1: name}: class 0 is the background."""

    def __missing__(self, label: Any) -> str:
        if label == 0:
            return BACKGROUND
        raise KeyError(label)


def name_foreground(config: Any) -> None:
    """Make `config.id2label` of a model with one channel name class 1, where class 0 was named; others stay."""
    if config.num_labels == 1:
        (name,) = config.id2label.values()
        config.id2label, config.label2id = ForegroundName({1: name}), {name: 1}


def num_classes(config: Any) -> int:
    """Number of classes that a segmentation model tells apart; its logits have `config.num_labels` channels."""
    return max(config.num_labels, 2)


def class_names(id2label: Mapping[int, str] | Mapping[str, str] | None, num_labels: int) -> list[str]:
    """The name of every class, each of them once, so that scores can be kept by name.

    Args:
        id2label: names by number, or by number as JSON has it, a string. Classes without one are called `LABEL_i`, as
            in transformers, and classes of one name get their number behind it. None for the numbers alone.
        num_labels: number of classes; 1 of a model with one channel. A single name for one or two is the foreground's.
    """
    if not id2label:
        return [str(index) for index in range(max(num_labels, 2))]
    given = {int(index): str(name) for index, name in id2label.items()}
    if num_labels <= 2 and len(given) == 1:
        return [BACKGROUND, *given.values()]
    names = [given.get(index, f"LABEL_{index}") for index in range(num_labels)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def labels_of_logits(logits: Tensor, threshold: float = 0.5, dim: int = -3) -> Tensor:
    """The class of every pixel.

    Args:
        logits: (..., num_labels, height, width).
        threshold: probability above which a pixel is foreground, where there is one channel.
        dim: the axis of the channels.

    Returns:
        (..., height, width) int64: the class with the largest logit; with one channel 1 or 0.
    """
    if logits.shape[dim] != 1:
        return logits.argmax(dim)
    return (logits.squeeze(dim) > math.log(threshold / (1 - threshold))).long()


def binary_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss of every pixel of a model with one channel, and where pixels count.

    Args:
        logits: (batch_size, 1, height, width).
        labels: (batch_size, height, width) integers: 0, 1, `ignore_index`, or any below 0, which does not count either.

    Returns:
        (batch_size, height, width) float, 0 where a pixel does not count, and a mask of the same shape, bool.

    Raises:
        ValueError: a label is another number.
    """
    counted = (labels >= 0) & (labels != ignore_index)
    targets = torch.where(counted, labels, 0)
    # What has more than one class would be learnt as a number; inside a compiled graph nobody can look.
    if not torch.compiler.is_compiling() and (targets > 1).any():
        raise ValueError(
            f"labels of a model with one channel must be 0, 1 or ignore_index={ignore_index}, "
            f"got {int(targets.max())}; set num_labels to the number of classes"
        )
    loss = F.binary_cross_entropy_with_logits(logits.squeeze(1), targets.to(logits.dtype), reduction="none")
    return loss * counted, counted
