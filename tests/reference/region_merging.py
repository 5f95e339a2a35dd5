"""Region merging in loops over regions: slow, and close to the description."""

import collections
import itertools
import math

import numpy as np


def edges_of(grid):
    """Neighbours on the grid, diagonals included, offset by offset: pairs of token indices."""
    found = []
    for offset in itertools.product((-1, 0, 1), repeat=len(grid)):
        if offset <= (0,) * len(grid):
            continue
        for place in itertools.product(*map(range, grid)):
            other = tuple(p + step for p, step in zip(place, offset, strict=True))
            if all(0 <= p < size for p, size in zip(other, grid, strict=True)):
                found.append((int(np.ravel_multi_index(place, grid)), int(np.ravel_multi_index(other, grid))))
    return found


def merge_regions(features, grid, counts, protected=(), label=None):
    """Groups (sets of tokens, by their first) after contracting to each of the counts in turn.

    `features` is (N, D) float64, of whole numbers, so that no sum depends on its order. `label` is the group, by its
    first token, that each token is in at the beginning; by default its own.
    """
    edges, label = edges_of(grid), list(range(len(features))) if label is None else label
    for count in counts:
        members = {region: [i for i, own in enumerate(label) if own == region] for region in set(label)}
        means = {region: features[tokens].sum(0) / len(tokens) for region, tokens in members.items()}

        def order(edge, label=label, members=members, means=means):
            first, second = (label[token] for token in edges[edge])
            sizes = len(members[first]), len(members[second])
            cost = ((means[first] - means[second]) ** 2).sum() * (sizes[0] * sizes[1] / sum(sizes))
            frozen = any(token in protected for token in edges[edge])
            return (math.inf if frozen else float(np.float32(cost))), edge

        picked = collections.Counter()
        for region in members:
            around = [e for e, ends in enumerate(edges) if len({label[t] for t in ends} | {region}) == 2]
            around = [e for e in around if region in {label[t] for t in edges[e]}]
            picked[min(around, key=order)] += 1
        turn = sorted(picked, key=lambda edge: (order(edge)[0] == math.inf, -picked[edge], order(edge)))
        for edge in turn[: len(members) - count]:
            first, second = (label[token] for token in edges[edge])
            label = [min(first, second) if own in (first, second) else own for own in label]
    return label
