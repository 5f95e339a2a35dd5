"""Density peaks by kernels: the ids of the plain operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ailurus_hf.benchmark.operations import OperationCounter
from ailurus_hf.kernels import density_peaks
from ailurus_hf.modeling.reduction import reduce
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings
from tests.kernels.cases import MAKERS, both, constant_tokens, kernels, plain_operations, random_tokens, whole_numbers


def assert_same_groups(tokens, grid, num_groups, **others):
    plain, fused = both(tokens, grid, num_groups, grouping="density_peaks", **others)
    assert all(map(torch.equal, fused.groups, plain.groups))
    assert [part.dtype for part in fused.groups] == [torch.int64] * 5


@pytest.mark.parametrize(
    ("make", "dtype"), [*((make, torch.float32) for make in MAKERS), (random_tokens, torch.bfloat16)]
)
def test_same_groups(make, dtype):
    assert_same_groups(make((5, 9), batch_size=3 if dtype == torch.bfloat16 else 1).to(dtype), (5, 9), 15)


@pytest.mark.parametrize("grid", [(1, 1, 2), (1, 9), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 99])
def test_grids_and_numbers_of_neighbours(grid, k):
    num_groups = math.prod(grid) // 3 or 1
    assert_same_groups(random_tokens(grid), grid, num_groups, num_neighbors=k, neighborhood_size=12)


@settings(max_examples=4)
@given(
    height=st.integers(1, 7),
    width=st.integers(2, 7),
    share=st.floats(0, 0.99),
    neighborhood_size=st.integers(1, 60),
    alpha=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_sizes(height, width, share, neighborhood_size, alpha):
    num_groups = max(int(share * height * width), 1)
    tokens = whole_numbers((height, width))
    assert_same_groups(tokens, (height, width), num_groups, neighborhood_size=neighborhood_size, spatial_alpha=alpha)


@pytest.mark.parametrize("make", [random_tokens, constant_tokens])
def test_small_programs_and_far_tokens(make, monkeypatch):
    """Few representatives, which few tokens have near; several programs in every launch."""
    for name, value in {"_PAIRS": 32, "_TOKENS": 16, "_OTHERS": 8, "_FAR_TOKENS": 8, "_FAR_OTHERS": 8}.items():
        monkeypatch.setattr(density_peaks, name, value)
    for name, value in {"_FEATURES": 8, "_LARGEST": 4, "_SPLITS": 3}.items():
        monkeypatch.setattr(density_peaks, name, value)
    assert_same_groups(make((7, 8)), (7, 8), 3, neighborhood_size=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [(0, 3), (0,), (...,)], ids=["one", "image", "all"])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_broken_tokens_get_valid_groups(bad, where):
    tokens = random_tokens((5, 6), 2)
    tokens[where] = bad
    with kernels():
        groups = reduce(tokens, (5, 6), 9, AdaptiveResolutionSettings(grouping="density_peaks")).groups
    assert torch.equal(groups.sizes, torch.stack([image.bincount(minlength=9) for image in groups.assignment]))
    assert groups.sizes.min() >= 1
    assert torch.equal(groups.assignment.gather(1, groups.representatives), torch.arange(9).expand(2, -1))


def test_what_the_kernels_do_not_take_stays_plain():
    with kernels() as launched:
        for tokens, others in (
            (random_tokens((4, 5)).double(), {}),
            (random_tokens((4, 5)), {"neighborhood_size": 300}),
        ):
            reduce(tokens, (4, 5), 7, AdaptiveResolutionSettings(grouping="density_peaks", **others))
    assert not {"_distances_kernel", "_groups_kernel"} & set(launched)
    with pytest.raises(ValueError, match="neighborhood_size at most 256"):
        density_peaks.density_peaks(random_tokens((4, 5)), [4, 5], 7, 1, 300, 0.9)


def test_launches_and_the_same_bits_twice():
    tokens, found = random_tokens((5, 9), 2), []
    for _ in range(2):
        with kernels() as launched:
            reduction = reduce(tokens, (5, 9), 15, AdaptiveResolutionSettings(grouping="density_peaks"))
            assert len(launched) == 6
            restored = reduction.restore(reduction.tokens)
            assert len(launched) == 7
        found.append((*reduction.groups, reduction.tokens, restored))
    assert all(map(torch.equal, *found))
    with OperationCounter() as counter:
        density_peaks.density_peaks(tokens, [5, 9], 15, 1, 50, 0.9)
    assert not plain_operations(counter)
