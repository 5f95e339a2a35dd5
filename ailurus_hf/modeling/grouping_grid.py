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
    group, shared = (
        torch.zeros_like(index),
        torch.full_like(index, num_groups),
    )  # first group of a token's box, how many
    is_middle = torch.ones_like(index, dtype=torch.bool)
    fewest, most, rest = num_groups, num_groups, num_tokens
    for axis, size in enumerate(grid):
        rest //= size
        place = index // rest % size
        if axis == len(grid) - 1:
            bands = shared
        else:
            count = _num_bands(grid[axis:], fewest, most)
            fewest, most, bands = fewest // count, -(-most // count), torch.full_like(index, count)
        band = place * bands // size
        start, stop = -(-band * size // bands), -(-(band + 1) * size // bands)
        is_middle &= place == (start + stop - 1) // 2
        begin, end = band * shared // bands, (band + 1) * shared // bands
        group, shared = group + begin, end - begin
    representatives = torch.where(is_middle, group, num_tokens).argsort(stable=True)[:num_groups]
    return group, representatives


def _num_bands(grid: tuple[int, ...], fewest: int, most: int) -> int:
    """How many bands the first axis is cut into, for boxes that are to hold `fewest` to `most` groups: such that cells
    come out as cubes, within what leaves every band at least one group and no more groups than tokens."""
    size, rest = grid[0], math.prod(grid[1:])
    side = (size * rest / most) ** (1 / len(grid))
    return min(max(round(size / side), -(-most // rest)), fewest, size)
