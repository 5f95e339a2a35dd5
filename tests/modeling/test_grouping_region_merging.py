"""Region merging against loops, and what its groups must be."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ailurus_hf import AiluRusModel, with_budget
from ailurus_hf.modeling import grouping_region_merging
from ailurus_hf.modeling.grouping_region_merging import (
    grid_edges,
    merge_regions,
    num_regions_after_rounds,
    project,
)
from ailurus_hf.modeling.token_groups import group_tokens, unfold_tokens
from tests.factories import random_images, tiny_model
from tests.reference import region_merging as reference

GRIDS = [(6, 8), (5, 9), (1, 7), (3, 4, 3)]


def whole_numbers(grid, high, seed=0, batch_size=1, hidden_size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (batch_size, math.prod(grid), hidden_size), generator=generator).double()


def by_first_member(assignment):
    first = {}
    return [first.setdefault(group, token) for token, group in enumerate(assignment.tolist())]


def is_connected(cells, grid):
    left = {tuple(place) for place in cells}
    reached = [left.pop()]
    while reached:
        place = reached.pop()
        near = {other for other in left if all(abs(a - b) <= 1 for a, b in zip(place, other, strict=True))}
        left -= near
        reached += near
    return not left


@pytest.mark.parametrize("high", [2, 5, 1000])  # 2: ties everywhere
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_groups_are_those_of_loops(grid, high):
    tokens, num_tokens = whole_numbers(grid, high), math.prod(grid)
    for num_groups in sorted({1, num_tokens // 4, num_tokens // 2, num_tokens - 1} - {0}):
        found, _ = merge_regions(tokens, grid, num_groups)
        counts = num_regions_after_rounds(num_tokens, num_groups)
        assert by_first_member(found[0]) == reference.merge_regions(tokens[0].numpy(), grid, counts)


def test_blocks_of_edges_change_no_bit(monkeypatch):
    tokens = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    whole = merge_regions(tokens, (6, 8), 12)
    monkeypatch.setattr(grouping_region_merging, "_EDGES_BLOCK", 7)
    for found, expected in zip(merge_regions(tokens, (6, 8), 12), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_groups", [12, 20, 40])
def test_protected_tokens_stay_by_themselves(num_groups):
    grid, protect = (6, 8), torch.zeros(2, 48, dtype=torch.bool)
    protect[0, [0, 9, 20, 21, 22, 47]] = protect[1, 30] = True
    tokens = whole_numbers(grid, 5, batch_size=2)
    found, _ = merge_regions(tokens, grid, num_groups, protect=protect)
    counts = num_regions_after_rounds(48, num_groups, protecting=True)
    for image in range(2):
        sizes = found[image].bincount(minlength=num_groups)
        assert sizes.min() >= 1
        assert (sizes[found[image]][protect[image]] == 1).all()
        protected = set(protect[image].nonzero().flatten().tolist())
        expected = reference.merge_regions(tokens[image].numpy(), grid, counts, protected)
        assert by_first_member(found[image]) == expected


@pytest.mark.parametrize("protecting", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_grow_on(grid, protecting):
    num_tokens = math.prod(grid)
    protect = torch.zeros(1, num_tokens, dtype=torch.bool)
    protect[0, [0, -1]] = protecting
    hint = protect if protecting else None
    first = group_tokens(*swap(merge_regions(whole_numbers(grid, 5), grid, num_tokens // 2, protect=hint)))
    again = whole_numbers((num_tokens // 2,), 5, seed=1)
    spread = unfold_tokens(again, first)
    for num_groups in {max(num_tokens // share, 3) for share in (2, 3, 6)}:
        found, representatives = merge_regions(again, grid, num_groups, protect=hint, merged=first)
        counts = num_regions_after_rounds(num_tokens // 2, num_groups, protecting)
        protected = set(protect[0].nonzero().flatten().tolist())
        begun = by_first_member(first.assignment[0])
        assert by_first_member(found[0]) == reference.merge_regions(spread[0].numpy(), grid, counts, protected, begun)
        assert torch.equal(found[0][representatives[0]], torch.arange(num_groups))
        assert set(representatives[0].tolist()) <= set(first.representatives[0].tolist())


def swap(result):
    """Arguments of `group_tokens` from what a grouping gives."""
    assignment, representatives = result
    return assignment, representatives.shape[1], representatives


@given(height=st.integers(1, 8), width=st.integers(1, 8), share=st.floats(0, 1), seed=st.integers(0, 3))
def test_exactly_so_many_connected_groups(height, width, share, seed):
    grid, num_tokens = (height, width), height * width
    num_groups = max(int(share * num_tokens), 1)
    assignment, representatives = merge_regions(whole_numbers(grid, 3, seed, batch_size=2), grid, num_groups)
    for groups, members in zip(assignment, representatives, strict=True):
        assert torch.equal(groups[members], torch.arange(num_groups))
        for group in range(num_groups):
            assert is_connected((groups.view(grid) == group).nonzero().tolist(), grid)


def test_flat_regions_come_out_whole():
    """An image of 5 flat regions in 5 groups, whatever the order of the edges."""
    regions = torch.tensor([[0] * 12 + [1] * 9 + [2] * 3 + [3] * 11 + [4]]).view(36)
    tokens = torch.nn.functional.one_hot(regions, 8).float()[None]
    assignment, _ = merge_regions(tokens, (6, 6), 5)
    assert by_first_member(assignment[0]) == by_first_member(regions)


def test_a_ramp_is_cut_across():
    tokens = torch.arange(16.0).expand(4, -1).reshape(1, 64, 1)
    assignment, _ = merge_regions(tokens, (4, 16), 16)
    assert torch.equal(assignment.view(4, 16), torch.arange(16).expand(4, -1))


def test_the_representative_is_nearest_to_the_mean():
    tokens = whole_numbers((6, 8), 50, seed=3)
    assignment, representatives = merge_regions(tokens, (6, 8), 10)
    for group, representative in enumerate(representatives[0]):
        members = (assignment[0] == group).nonzero().flatten()
        distance = (tokens[0, members] - tokens[0, members].mean(0)).square().sum(1)
        assert members[distance.float().argmin()] == representative


def test_broken_tokens_merge_last():
    tokens = whole_numbers((6, 8), 5).float()
    tokens[0, 24:26], tokens[0, 33] = math.nan, math.inf  # neighbours, which pick each other, too
    assignment, _ = merge_regions(tokens, (6, 8), 12)
    assert (assignment[0].bincount()[assignment[0, [24, 25, 33]]] == 1).all()


def test_projected_distances_are_the_distances():
    tokens = torch.randn(1, 200, 768, generator=torch.Generator().manual_seed(0))
    assert project(tokens).shape == (1, 200, 64)
    assert torch.equal(project(tokens), project(tokens))
    exact, projected = torch.cdist(tokens, tokens)[0], torch.cdist(project(tokens), project(tokens))[0]
    ratio = (projected / exact)[~torch.eye(200, dtype=torch.bool)]
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 0.12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_group(dtype):
    tokens = torch.randn(1, 100, 128, generator=torch.Generator().manual_seed(1))
    expected = merge_regions(tokens, (10, 10), 20)
    with torch.autocast("cpu", dtype=dtype):
        assert all(map(torch.equal, merge_regions(tokens, (10, 10), 20), expected))


def test_every_pair_of_neighbours_once():
    first, second = grid_edges((3, 4), torch.device("cpu"))
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == sorted(reference.edges_of((3, 4)))


@pytest.mark.parametrize("protecting", [False, True])
def test_rounds_end_with_the_number_asked_for(protecting):
    for num_tokens in range(1, 60):
        for num_groups in range(1, num_tokens + 1):
            counts = [num_tokens, *num_regions_after_rounds(num_tokens, num_groups, protecting)]
            assert counts[-1] == num_groups
            assert all(after < before <= 2 * after for before, after in itertools.pairwise(counts))


def test_models_protect_what_a_context_says():
    model = tiny_model(AiluRusModel, keep_ratio=0.5, grouping="region_merging")
    protect = torch.zeros(2, 36, dtype=torch.bool)
    protect[:, :6] = True
    with with_budget(model, protect=protect):
        output = model(random_images())
    assert (output.group_sizes.gather(1, output.assignment)[protect] == 1).all()
    with with_budget(model, protect=protect[:1]), pytest.raises(ValueError, match=r"protect must be \(2, 36\) bool"):
        model(random_images())
    with (
        with_budget(model, protect=~protect),
        pytest.raises(ValueError, match="room for the protected tokens, up to 30"),
    ):
        model(random_images())


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="on grid"):
        merge_regions(torch.zeros(1, 5, 4), (2, 3), 2)
    with pytest.raises(ValueError, match="num_groups must be between"):
        merge_regions(torch.zeros(1, 6, 4), (2, 3), 7)


def test_rounds_share_one_region_of_a_graph():
    """Whatever number of rounds, one graph holds one of them, and refers to it."""
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    tokens = torch.randn(2, 63, 16)
    compiled = torch.compile(merge_regions, fullgraph=True, backend=backend)
    found = compiled(tokens, (7, 9), 20)
    (module,) = graphs
    rounds = [node for node in module.graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len(rounds) == len(num_regions_after_rounds(63, 20)) > 5
    assert len([name for name, _ in module.named_children()]) == 1
    assert torch.equal(found[0], merge_regions(tokens, (7, 9), 20)[0])
