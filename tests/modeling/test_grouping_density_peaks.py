import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ailurus_hf.modeling import grouping_density_peaks
from ailurus_hf.modeling.grouping_density_peaks import (
    cluster_tokens,
    neighbor_indices,
    neighborhood_distances,
    neighborhood_offsets,
    offsets_on,
)
from tests.reference.clustering import cluster_image, offsets_by_brute_force

GRIDS = [(7, 13), (1, 1), (1, 9), (9, 1), (2, 2), (5, 5), (3, 4, 5), (6,)]


def integer_tokens(num_tokens: int, hidden_size: int = 4, seed: int = 0, high: int = 4) -> torch.Tensor:
    """Features on a coarse integer lattice: many exact ties, and no rounding that could hide a wrong tie rule."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (1, num_tokens, hidden_size), generator=generator).float()


def assert_matches_reference(tokens, grid, num_clusters, k=1, neighborhood_size=50, alpha=0.9):
    assignment, representatives = cluster_tokens(
        tokens, grid, num_clusters, num_neighbors=k, neighborhood_size=neighborhood_size, spatial_alpha=alpha
    )
    offsets = (
        offsets_by_brute_force(len(grid), neighborhood_size)
        if len(grid) < 3
        else list(neighborhood_offsets(len(grid), neighborhood_size))
    )
    for image, found, chosen in zip(tokens, assignment, representatives, strict=True):
        expected, expected_representatives = cluster_image(image.numpy(), grid, num_clusters, k, offsets, alpha)
        assert chosen.tolist() == expected_representatives
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("num_axes", "neighborhood_size"),
    [(axes, size) for axes in (1, 2, 3) for size in (1, 2, 4, 5, 8, 11, 20) if axes < 3 or size <= 11],
)
def test_offsets_are_the_nearest_in_order(num_axes, neighborhood_size):
    expected = offsets_by_brute_force(num_axes, neighborhood_size)
    assert list(neighborhood_offsets(num_axes, neighborhood_size)) == expected


def test_default_neighborhood_reaches_four_steps():
    offsets = neighborhood_offsets(2, 50)
    assert offsets[:4] == ((-1, 0), (0, -1), (0, 1), (1, 0))
    assert offsets[48:] == ((-4, -1), (-4, 1))


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbor_table_and_distances(grid):
    offsets = neighborhood_offsets(len(grid), 12)
    num_tokens = math.prod(grid)
    tokens = torch.randn(2, num_tokens, 6, dtype=torch.float64)
    table = neighbor_indices(grid, offsets, tokens.device)
    distances = neighborhood_distances(tokens, grid, offsets, 0.7)
    positions = list(np.ndindex(*grid))
    for rank, offset in enumerate(offsets):
        for i, position in enumerate(positions):
            neighbor = tuple(int(p + o) for p, o in zip(position, offset, strict=True))
            if neighbor not in positions:
                assert table[rank, i] == -1
                assert (distances[:, rank, i] == math.inf).all()
                continue
            j = positions.index(neighbor)
            assert table[rank, i] == j
            weight = (0.7 + 0.3 * (rank + 1) / 12) / math.sqrt(6)
            expected = weight * (tokens[:, i] - tokens[:, j]).norm(dim=-1)
            torch.testing.assert_close(distances[:, rank, i], expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3, 99])
def test_matches_loops_on_random_features(grid, share, k):
    num_tokens = math.prod(grid)
    tokens = torch.randn(2, num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    assert_matches_reference(tokens, grid, max(1, int(share * num_tokens)), k=k, neighborhood_size=12)


@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    share=st.floats(0.0, 1.0),
    neighborhood_size=st.integers(1, 60),
    alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    high=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_matches_loops_where_ties_abound(height, width, share, neighborhood_size, alpha, high, seed):
    num_tokens = height * width
    tokens = integer_tokens(num_tokens, seed=seed, high=high)
    num_clusters = max(1, round(share * num_tokens))
    assert_matches_reference(tokens.double(), (height, width), num_clusters, 1, neighborhood_size, alpha)


def test_float32_breaks_ties_like_the_reference():
    for seed in range(20):
        assert_matches_reference(integer_tokens(35, seed=seed), (5, 7), 9, alpha=1.0)


def test_few_clusters_reach_tokens_without_a_representative_nearby():
    """One busy corner takes all representatives; the far tokens join by features alone."""
    tokens = torch.zeros(1, 20 * 20, 4)
    busy = [row * 20 + column for row in range(4) for column in range(4)]
    tokens[0, busy] = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)) * 10
    assert_matches_reference(tokens.double(), (20, 20), 8, neighborhood_size=8)


def test_fallback_is_the_same_with_static_shapes(monkeypatch):
    """Inside compiled graphs and off the CPU all tokens are compared, in blocks: the result must not change."""
    tokens = torch.randn(3, 15 * 15, 6, generator=torch.Generator().manual_seed(2))
    tokens[1] = tokens[1].round()
    plain = cluster_tokens(tokens, (15, 15), 5, neighborhood_size=4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(grouping_density_peaks, "_MAX_DISTANCE_BLOCK", 5 * 7)
    static = cluster_tokens(tokens, (15, 15), 5, neighborhood_size=4)
    for one, other in zip(plain, static, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@given(height=st.integers(1, 12), width=st.integers(1, 12), share=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_every_cluster_has_its_representative(height, width, share, seed):
    num_tokens = height * width
    num_clusters = max(1, round(share * num_tokens))
    tokens = torch.randn(2, num_tokens, 5, generator=torch.Generator().manual_seed(seed))
    assignment, representatives = cluster_tokens(tokens, (height, width), num_clusters)
    assert assignment.shape == (2, num_tokens)
    assert assignment.dtype == torch.int64
    assert representatives.shape == (2, num_clusters)
    assert (representatives.diff(dim=1) > 0).all()
    own = torch.arange(num_clusters).expand(2, -1)
    assert torch.equal(assignment.gather(1, representatives), own)


def test_batch_equals_single_images_and_repeats_bit_for_bit():
    tokens = torch.randn(4, 9 * 11, 16, generator=torch.Generator().manual_seed(3))
    batch = cluster_tokens(tokens, (9, 11), 20)
    again = cluster_tokens(tokens, (9, 11), 20)
    singles = [cluster_tokens(image[None], (9, 11), 20) for image in tokens]
    for part in range(2):
        assert torch.equal(batch[part], again[part])
        assert torch.equal(batch[part], torch.cat([single[part] for single in singles]))


def test_translating_all_features_changes_nothing():
    tokens = integer_tokens(8 * 9, hidden_size=8, seed=4, high=50)
    moved = cluster_tokens(tokens + 1024.0, (8, 9), 10, neighborhood_size=6)
    for one, other in zip(cluster_tokens(tokens, (8, 9), 10, neighborhood_size=6), moved, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_clustered_in_float32(dtype):
    tokens = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    for one, other in zip(cluster_tokens(tokens, (8, 8), 20), cluster_tokens(tokens.float(), (8, 8), 20), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grid", [(7, 9), (1, 9), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("pairs", [1, 30, 200])
def test_parts_one_after_the_other_give_the_same_bits(grid, pairs, monkeypatch):
    tokens, offsets = torch.randn(2, math.prod(grid), 8), neighborhood_offsets(len(grid), 50)
    expected = neighborhood_distances(tokens, grid, offsets, 0.9)
    monkeypatch.setattr(grouping_density_peaks, "_MAX_DIFFERENCES_BLOCK", pairs * tokens[:, 0].numel())
    assert torch.equal(neighborhood_distances(tokens, grid, offsets, 0.9), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 300])  # 300: squared, beyond float16
@pytest.mark.parametrize("neighborhood_size", [4, 50])
def test_autocast_changes_no_group(dtype, scale, neighborhood_size):
    tokens = scale * torch.randn(2, 400, 64, generator=torch.Generator().manual_seed(7))
    expected = cluster_tokens(tokens, (20, 20), 40, neighborhood_size=neighborhood_size)
    with torch.autocast("cpu", dtype=dtype):
        found = cluster_tokens(tokens, (20, 20), 40, neighborhood_size=neighborhood_size)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one", "row", "all"])
@pytest.mark.parametrize("k", [1, 4])
def test_non_finite_features_stay_in_range(bad, where, k):
    tokens = torch.randn(2, 36, 4, generator=torch.Generator().manual_seed(6))
    tokens[{"one": (0, 3), "row": (0,), "all": (...,)}[where]] = bad
    assignment, representatives = cluster_tokens(tokens, (6, 6), 7, num_neighbors=k)
    assert assignment.min() >= 0
    assert assignment.max() < 7
    assert representatives.min() >= 0
    assert representatives.max() < 36
    own = torch.arange(7).expand(2, -1)
    assert torch.equal(assignment.gather(1, representatives), own)


def test_no_quadratic_memory():
    """16 384 tokens: a single N x N float32 matrix would be 1 GiB."""
    from torch.profiler import ProfilerActivity, profile

    tokens = torch.randn(1, 128 * 128, 4, generator=torch.Generator().manual_seed(7))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cluster_tokens(tokens, (128, 128), 4096)
    largest = max(abs(event.cpu_memory_usage) for event in profiler.events())
    assert largest < 128**2 * 50 * 16


def test_singletons_collect_at_contours():
    """Two flat halves: the tokens kept single lie along the border between them."""
    tokens = torch.zeros(1, 16 * 16, 4)
    grid = tokens.view(16, 16, 4)
    grid[:, 8:] = 10.0
    grid += torch.randn(16, 16, 4, generator=torch.Generator().manual_seed(8)) * 0.05
    grid[:, 7:9] += torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(9)) * 2
    assignment, _ = cluster_tokens(tokens, (16, 16), 64)
    sizes = torch.bincount(assignment[0], minlength=64)[assignment[0]].view(16, 16).float()
    assert (sizes[:, 7:9] == 1).float().mean() > 2 * (sizes[:, :6] == 1).float().mean()


@pytest.mark.parametrize("num_clusters", [0, -1, 13])
def test_refuses_impossible_counts(num_clusters):
    with pytest.raises(ValueError, match=f"num_clusters must be between 1 and .* 12, got {num_clusters}"):
        cluster_tokens(torch.zeros(1, 12, 4), (3, 4), num_clusters)


def test_refuses_tokens_that_do_not_fit_the_grid():
    with pytest.raises(ValueError, match=r"tokens must be \(batch_size, 12, hidden_size\) on grid \(3, 4\)"):
        cluster_tokens(torch.zeros(1, 13, 4), (3, 4), 2)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 400))
def test_a_neighbourhood_beyond_the_grid_is_cut(grid, neighborhood_size):
    """What is cut leads out of the grid from everywhere, and the rest keeps its weights: the same clusters."""
    offsets, every = offsets_on(tuple(grid), neighborhood_size), neighborhood_offsets(len(grid), neighborhood_size)
    assert offsets == every[: len(offsets)]
    assert all(any(abs(step) >= size for step, size in zip(o, grid, strict=True)) for o in every[len(offsets) :])


def test_a_huge_neighbourhood_is_the_whole_grid():
    tokens = torch.randn(2, 30, 8)
    found = cluster_tokens(tokens, (5, 6), 7, neighborhood_size=10**9, spatial_alpha=1)
    expected = cluster_tokens(tokens, (5, 6), 7, neighborhood_size=400, spatial_alpha=1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
