"""Merging, unfolding and size-weighted attention with loops, differentiable by autograd."""

import torch
from torch import Tensor


def merge(tokens: Tensor, assignment: Tensor, num_groups: int) -> Tensor:
    images = []
    for image, groups in zip(tokens, assignment.tolist(), strict=True):
        members = [[image[i] for i, group in enumerate(groups) if group == wanted] for wanted in range(num_groups)]
        images.append(torch.stack([sum(group[1:], start=group[0]) / len(group) for group in members]))
    return torch.stack(images)


def unfold(merged: Tensor, assignment: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([image[group] for group in groups])
            for image, groups in zip(merged, assignment.tolist(), strict=True)
        ]
    )


def attention_on_copies(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, scaling: float) -> Tensor:
    """Attention of one image in which every key and value is literally repeated `size` times."""
    key = key.repeat_interleave(sizes, dim=-2)
    value = value.repeat_interleave(sizes, dim=-2)
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, dim=-1)
    return weights @ value
