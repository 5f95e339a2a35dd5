import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ailurus_hf.modeling.layers_ailurus import eager_attention_forward
from ailurus_hf.modeling.size_weighted_attention import append_size_channels, size_weighted_attention
from ailurus_hf.modeling.token_groups import group_tokens, merge_tokens, table, unfold_tokens
from tests.reference import merging as reference


def random_assignment(batch_size: int, num_tokens: int, num_groups: int, seed: int = 0) -> torch.Tensor:
    """Every group used at least once, otherwise at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch_size):
        groups = torch.cat(
            [torch.arange(num_groups), torch.randint(0, num_groups, (num_tokens - num_groups,), generator=generator)]
        )
        rows.append(groups[torch.randperm(num_tokens, generator=generator)])
    return torch.stack(rows)


@given(num_tokens=st.integers(1, 40), share=st.floats(0.0, 1.0), batch_size=st.integers(1, 3), seed=st.integers(0, 999))
def test_groups_describe_the_assignment(num_tokens, share, batch_size, seed):
    num_groups = max(1, round(share * num_tokens))
    assignment = random_assignment(batch_size, num_tokens, num_groups, seed)
    groups = group_tokens(assignment, num_groups)
    assert torch.equal(groups.sizes.sum(1), torch.full((batch_size,), num_tokens))
    for image in range(batch_size):
        counts = torch.bincount(assignment[image], minlength=num_groups)
        assert torch.equal(groups.sizes[image], counts)
        members = [(assignment[image] == group).nonzero()[:, 0].tolist() for group in range(num_groups)]
        assert groups.order[image].tolist() == [token for group in members for token in group]
        assert groups.representatives[image].tolist() == [group[0] for group in members]


def test_given_representatives_are_kept():
    representatives = torch.tensor([[1, 3]])
    groups = group_tokens(torch.tensor([[0, 0, 1, 1]]), 2, representatives)
    assert groups.representatives is representatives


@given(num_tokens=st.integers(1, 20), share=st.floats(0.0, 1.0), batch_size=st.integers(1, 3), seed=st.integers(0, 999))
def test_merge_and_unfold_match_loops_with_gradients(num_tokens, share, batch_size, seed):
    num_groups = max(1, round(share * num_tokens))
    assignment = random_assignment(batch_size, num_tokens, num_groups, seed)
    groups = group_tokens(assignment, num_groups)
    tokens = torch.randn(batch_size, num_tokens, 3, dtype=torch.float64, requires_grad=True)
    loop_tokens = tokens.detach().clone().requires_grad_()

    merged, loop_merged = merge_tokens(tokens, groups), reference.merge(loop_tokens, assignment, num_groups)
    torch.testing.assert_close(merged, loop_merged)
    grid, loop_grid = unfold_tokens(merged.sin(), groups), reference.unfold(loop_merged.sin(), assignment)
    torch.testing.assert_close(grid, loop_grid)
    weight = torch.randn_like(grid)
    (grid * weight).sum().backward()
    (loop_grid * weight).sum().backward()
    torch.testing.assert_close(tokens.grad, loop_tokens.grad)


def test_gradcheck():
    groups = group_tokens(random_assignment(2, 7, 3), 3)
    tokens = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unfold_tokens(merge_tokens(x, groups), groups), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_singletons_keep_their_bits_and_dtype(dtype):
    assignment = random_assignment(2, 30, 20)
    groups = group_tokens(assignment, 20)
    tokens = torch.randn(2, 30, 5).to(dtype)
    back = unfold_tokens(merge_tokens(tokens, groups), groups)
    single = groups.sizes.gather(1, assignment) == 1
    assert single.any()
    assert not single.all()
    assert back.dtype == dtype
    assert torch.equal(back[single], tokens[single])


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1), (torch.float16, 30), (torch.float16, 60000)])
def test_half_precision_sums_over_members_are_made_in_float32(dtype, value):
    """4096 equal tokens: the sum of ones stops growing at 256 in bfloat16, that of thirties overflows float16."""
    groups = group_tokens(torch.zeros(1, 4096, dtype=torch.int64), 1)
    tokens = torch.full((1, 4096, 3), value, dtype=dtype, requires_grad=True)
    merged = merge_tokens(tokens, groups)
    assert (merged == value).all()
    unfolded = unfold_tokens(merged, groups)
    gradients = torch.autograd.grad(unfolded, [merged, tokens], torch.full_like(unfolded, 0.25))
    assert (gradients[0] == 1024).all()
    assert (gradients[1] == 0.25).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype):
    groups = group_tokens(random_assignment(2, 30, 8), 8)
    tokens = torch.randn(2, 30, 4).to(dtype)
    gradients = []
    for leaf in (tokens.clone().requires_grad_(), tokens.double().requires_grad_()):
        unfold_tokens(merge_tokens(leaf, groups), groups).square().sum().backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=0.05)


def test_unfold_of_merge_is_idempotent():
    groups = group_tokens(random_assignment(2, 30, 8), 8)
    once = unfold_tokens(merge_tokens(torch.randn(2, 30, 4, dtype=torch.float64), groups), groups)
    torch.testing.assert_close(unfold_tokens(merge_tokens(once, groups), groups), once)


@pytest.mark.parametrize("implementation", ["eager", "flash"])
@pytest.mark.parametrize("head_dim", [4, 6, 16])
def test_a_merged_token_counts_as_often_as_its_members(implementation, head_dim):
    """Against attention in which every key is literally repeated. "flash" stands for kernels without additive masks:
    its sizes ride in the dot product, here on the eager function, which gets no mask."""
    sizes = torch.tensor([1, 3, 1, 17, 1024])
    query, key, value = (torch.randn(1, 2, 5, head_dim, dtype=torch.float64) for _ in range(3))
    output, _ = size_weighted_attention(
        eager_attention_forward, implementation, torch.nn.Identity(), query, key, value, sizes.log()[None].double(),
        scaling=head_dim**-0.5,
    )  # fmt: skip
    expected = reference.attention_on_copies(query, key, value, sizes, head_dim**-0.5).transpose(1, 2)
    # The eager function rounds its weights through float32.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_size_channels_fill_a_multiple_of_eight():
    query, key, value = (torch.randn(2, 3, 7, 12) for _ in range(3))
    padded = append_size_channels(query, key, value, torch.zeros(2, 7), 0.5)
    assert [tensor.shape[-1] for tensor in padded] == [16, 16, 16]


def test_size_channels_lose_less_than_a_rounded_bias():
    scaling, log_sizes = 64**-0.5, torch.arange(1, 2000).float().log()[None]
    zeros = torch.zeros(1, 1, log_sizes.shape[1], 64, dtype=torch.bfloat16)
    query, key, _ = append_size_channels(zeros, zeros, zeros, log_sizes, scaling)
    carried = (query[0, 0, :1].double() @ key[0, 0].double().T)[0] * scaling
    channel_error = (carried - log_sizes[0]).abs().max()
    bias_error = (log_sizes[0].bfloat16().double() - log_sizes[0]).abs().max()
    assert channel_error < bias_error / 50


def test_merge_is_exact_on_integers_whatever_the_order():
    tokens = torch.arange(24.0).view(1, 12, 2)
    groups = group_tokens(torch.tensor([[0, 1] * 6]), 2)
    assert merge_tokens(tokens, groups).tolist() == [[[10.0, 11.0], [12.0, 13.0]]]


def test_tables_are_made_once_and_fit_every_mode():
    made = []

    def count_up(length, device):
        made.append(length)
        return torch.arange(length, device=device)

    tokens = torch.randn(1, 3, 2)
    with torch.inference_mode():
        first = table(count_up, 3, like=tokens)
    assert not first.is_inference()
    assert table(count_up, 3, like=tokens) is first
    assert table(count_up, 3, like=tokens.to("meta")).device.type == "meta"
    assert made == [3, 3]
    with FakeTensorMode() as mode:
        fake = table(count_up, 3, like=mode.from_tensor(tokens))
    assert isinstance(fake, FakeTensor)
    assert table(count_up, 3, like=tokens) is first
