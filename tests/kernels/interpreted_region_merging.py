"""Region merging by kernels: the ids of the plain operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ailurus_hf.benchmark.operations import OperationCounter
from ailurus_hf.kernels import region_merging
from ailurus_hf.modeling import grouping_region_merging
from ailurus_hf.modeling.grouping_region_merging import num_regions_after_rounds
from ailurus_hf.modeling.reduction import ReductionContext, reduce
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings
from tests.kernels.cases import MAKERS, both, kernels, plain_operations, random_tokens, whole_numbers

SETTINGS = AdaptiveResolutionSettings(grouping="region_merging")


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(grouping_region_merging, "NUM_ROUNDS", 2)


def assert_same_groups(tokens, grid, num_groups, exact=True):
    plain, fused = both(tokens, grid, num_groups, grouping="region_merging")
    for field, found, expected in zip(plain.groups._fields, fused.groups, plain.groups, strict=True):
        assert found.dtype == torch.int64
        assert torch.equal(found, expected) or (field == "representatives" and not exact), field
    return plain, fused


@pytest.mark.parametrize(
    ("make", "dtype"), [*((make, torch.float32) for make in MAKERS), (random_tokens, torch.bfloat16)]
)
def test_same_groups(make, dtype):
    """Of two tokens alone in a group both are as near to the mean: with random ones, rounding decides."""
    assert_same_groups(
        make((5, 9), batch_size=3 if dtype == torch.bfloat16 else 1).to(dtype),
        (5, 9),
        15,
        exact=make is not random_tokens,
    )


def test_the_token_that_stands_for_a_group_is_nearest_to_its_mean():
    tokens = random_tokens((5, 9))
    _, fused = both(tokens, (5, 9), 15, grouping="region_merging")
    distance = (tokens - fused.spread(fused.tokens)).square().sum(-1)
    for group, representative in enumerate(fused.groups.representatives[0]):
        nearest = distance[0, fused.groups.assignment[0] == group].min()
        torch.testing.assert_close(distance[0, representative], nearest, rtol=1e-5, atol=1e-6)


def test_all_rounds_and_projected_features(monkeypatch):
    monkeypatch.setattr(grouping_region_merging, "NUM_ROUNDS", 6)
    assert_same_groups(random_tokens((6, 8), hidden_size=100), (6, 8), 12, exact=False)


@pytest.mark.parametrize("grid", [(1, 2), (1, 9), (3, 4, 3)], ids=str)
def test_grids(grid):
    assert_same_groups(whole_numbers(grid), grid, math.prod(grid) // 3 or 1)


@settings(max_examples=3)
@given(height=st.integers(1, 6), width=st.integers(2, 6), share=st.floats(0.05, 0.99))
def test_sizes(height, width, share):
    assert_same_groups(whole_numbers((height, width)), (height, width), max(int(share * height * width), 1))


def test_small_programs(monkeypatch):
    for name, value in {"_TOKENS": 8, "_EDGES": 8, "_REGIONS": 4, "_WINDOW": 8}.items():
        monkeypatch.setattr(region_merging, name, value)
    assert_same_groups(whole_numbers((5, 6), batch_size=2), (5, 6), 8)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_broken_tokens_merge_last():
    tokens = whole_numbers((5, 6))
    tokens[0, 12:14], tokens[0, 21] = math.nan, math.inf
    assert_same_groups(tokens, (5, 6), 8)


def test_hints_and_float64_stay_plain():
    protect = torch.zeros(1, 20, dtype=torch.bool)
    protect[0, 3] = True
    tokens = random_tokens((4, 5))
    expected = reduce(tokens, (4, 5), 10, SETTINGS, ReductionContext(protect=protect))
    with kernels() as launched:
        found = reduce(tokens, (4, 5), 10, SETTINGS, ReductionContext(protect=protect))
        again = reduce(found.tokens, (4, 5), 5, SETTINGS, ReductionContext(reduction=found))
        reduce(tokens.double(), (4, 5), 10, SETTINGS)
    assert all(map(torch.equal, found.groups, expected.groups))
    assert not {"_contract_kernel", "_groups_kernel"} & set(launched)
    expected = reduce(expected.tokens, (4, 5), 5, SETTINGS, ReductionContext(reduction=expected))
    assert all(map(torch.equal, again.groups, expected.groups))


def test_launches_and_the_same_bits_twice():
    tokens, found = random_tokens((5, 9), 2, hidden_size=100).bfloat16(), []
    num_rounds = len(num_regions_after_rounds(45, 15))
    for _ in range(2):
        with kernels() as launched, OperationCounter() as counter:
            reduction = reduce(tokens, (5, 9), 15, SETTINGS)
        assert len(launched) == 2 * num_rounds + 3
        if not found:  # the tables of signs and edges are made at first
            found.append((*reduction.groups, reduction.tokens, reduction.residual))
            continue
        beside = {"_to_copy": 1, "mm": 1}  # projecting the features
        assert plain_operations(counter) == {"region_merging": 1, "merge": 1, **beside}
        found.append((*reduction.groups, reduction.tokens, reduction.residual))
    assert all(map(torch.equal, *found))
    points = random_tokens((5, 9), 2)
    with OperationCounter() as counter:
        region_merging.region_merging(points, [5, 9], 15)
    assert not plain_operations(counter)
