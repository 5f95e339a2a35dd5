"""AiluRus clustering with loops over tokens and neighbours, for one image, in float64."""

import math
from itertools import product

import numpy as np


def offsets_by_brute_force(num_axes: int, neighborhood_size: int) -> list[tuple[int, ...]]:
    """All offsets of a generous cube, sorted by squared length, then lexicographically."""
    reach = neighborhood_size  # even on one axis, that many steps away there are enough
    cube = [o for o in product(range(-reach, reach + 1), repeat=num_axes) if any(o)]
    return sorted(cube, key=lambda o: (sum(step**2 for step in o), o))[:neighborhood_size]


def cluster_image(
    tokens: np.ndarray, grid: tuple[int, ...], num_clusters: int, k: int, offsets: list[tuple[int, ...]], alpha: float
) -> tuple[list[int], list[int]]:
    """Assignment of each token of (N, D) and representatives, step by step as the method is written down."""
    tokens = np.asarray(tokens, dtype=np.float64)
    num_tokens, hidden_size = tokens.shape
    positions = list(product(*map(range, grid)))
    index_of = {position: index for index, position in enumerate(positions)}

    sigma: list[dict[int, float]] = []
    rank_of: list[dict[int, int]] = []
    for i, position in enumerate(positions):
        distances, ranks = {}, {}
        for rank, offset in enumerate(offsets, start=1):
            j = index_of.get(tuple(p + o for p, o in zip(position, offset, strict=True)))
            if j is None:
                continue
            weight = alpha + (1 - alpha) * rank / len(offsets)
            distances[j] = weight * math.sqrt(((tokens[i] - tokens[j]) ** 2).sum()) / math.sqrt(hidden_size)
            ranks[j] = rank
        sigma.append(distances)
        rank_of.append(ranks)

    log_density = []
    for distances in sigma:
        nearest = sorted(distances.values())[:k]
        log_density.append(-sum(nearest) / len(nearest) if nearest else -math.inf)

    largest = max((d for distances in sigma for d in distances.values()), default=0.0)
    score = []
    for i, distances in enumerate(sigma):
        denser = [d for j, d in distances.items() if (log_density[j], -j) > (log_density[i], -i)]
        delta = min(denser) if denser else largest
        score.append(log_density[i] + (math.log(delta) if delta > 0 else -math.inf))

    ranking = sorted(range(num_tokens), key=lambda i: (-score[i], i))
    representatives = sorted(ranking[:num_clusters])
    cluster_of = {token: cluster for cluster, token in enumerate(representatives)}

    assignment = []
    for i, distances in enumerate(sigma):
        nearby = [(d, rank_of[i][j], j) for j, d in distances.items() if j in cluster_of]
        if i in cluster_of:
            assignment.append(cluster_of[i])
        elif nearby:
            assignment.append(cluster_of[min(nearby)[2]])
        else:
            anywhere = [(((tokens[i] - tokens[j]) ** 2).sum(), j) for j in representatives]
            assignment.append(cluster_of[min(anywhere)[1]])
    return assignment, representatives
