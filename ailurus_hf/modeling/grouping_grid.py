"""Grouping by a regular grid of cells: average pooling, to exactly the number of tokens asked for.

A pure function of sizes: the tokens' features take no part. The baseline that every other method has to beat.
"""

import math

import torch
from torch import Tensor


def grid_cells(grid: tuple[int, ...], num_groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Divide a grid into `num_groups` boxes of nearly the same size, as near to cubes as their number allows.

    The first axis is cut into bands, the groups are shared out among them as evenly as whole numbers allow, and every
    band is cut along the next axis in the same way. Where it can be this is average pooling: 300 groups of 30 x 40
    tokens are cells of 2 x 2.

    Args:
        grid: sizes of the grid axes in tokens, `(height, width)` or `(time, height, width)`; their product is N.
        num_groups: M, from 1 to N.

    Returns:
        assignment: (N,) int64, each token's group in [0, M).
        representatives: (M,) int64, the token in the middle of each group.
    """
    num_tokens = math.prod(grid)
    index = torch.arange(num_tokens, device=device)
    # Of the box that each token is in: its first group, and how many it has.
    group, shared = torch.zeros_like(index), torch.full_like(index, num_groups)
    is_middle = torch.ones_like(index, dtype=torch.bool)
    rest = num_tokens
    for axis, size in enumerate(grid):
        bands = shared if axis == len(grid) - 1 else _num_bands(grid[axis:], shared)
        rest //= size
        place = index // rest % size
        band = place * bands // size
        start, stop = -(-band * size // bands), -(-(band + 1) * size // bands)
        is_middle &= place == (start + stop - 1) // 2
        begin, end = band * shared // bands, (band + 1) * shared // bands
        group, shared = group + begin, end - begin
    representatives = torch.where(is_middle, group, num_tokens).argsort(stable=True)[:num_groups]
    return group, representatives


def _num_bands(grid: tuple[int, ...], shared: Tensor) -> Tensor:
    """How many bands the first axis of a box is cut into that is to hold `shared` groups: such that cells come out as
    cubes, within what leaves every band at least one group and no more groups than each of its lines has tokens."""
    size, rest = grid[0], math.prod(grid[1:])
    side = (size * rest / shared) ** (1 / len(grid))
    bands = torch.maximum((size / side).round().long(), -(-shared // rest))
    return torch.minimum(bands, shared).clamp(max=size)
