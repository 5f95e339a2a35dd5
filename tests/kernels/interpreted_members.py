"""Merging and unfolding by kernels: the bits of the plain operations, and their gradients."""

import pytest
import torch
from torch.autograd import gradcheck

from ailurus_hf.benchmark.operations import OperationCounter
from ailurus_hf.kernels import merging
from ailurus_hf.kernels.launching import members
from ailurus_hf.kernels.merging import merge_op, reduce_members_op
from ailurus_hf.kernels.unfolding import restore, restore_op, spread_op
from ailurus_hf.modeling.reduction import reduce_to_groups
from ailurus_hf.modeling.token_groups import group_tokens, merge_tokens, unfold_tokens
from tests.kernels.cases import kernels, plain_operations, random_tokens


def groups_of(batch_size, num_tokens, num_groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, num_groups, (batch_size, num_tokens - num_groups), generator=generator)
    return group_tokens(torch.cat([torch.arange(num_groups).expand(batch_size, -1), rest], dim=1), num_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("unfold", ["copy", "residual"])
def test_same_bits(dtype, unfold):
    for batch_size, num_tokens, num_groups, hidden_size in ((1, 40, 11, 300), (3, 7, 1, 5), (2, 20, 19, 16)):
        tokens = random_tokens((num_tokens + 2,), batch_size, hidden_size).to(dtype)[:, 1:-1]  # inside a sequence
        groups = groups_of(batch_size, num_tokens, num_groups)
        plain = reduce_to_groups(tokens, groups, unfold)
        later = plain.tokens * 2
        with kernels() as launched:
            fused = reduce_to_groups(tokens, groups, unfold)
            assert launched == ["_merge_kernel"]
            found = fused.restore(later), fused.merge(tokens), fused.spread(later)
            assert launched == ["_merge_kernel", "_unfold_kernel", "_merge_kernel", "_unfold_kernel"]
        # The interpreter cuts bits off where a GPU rounds to bfloat16.
        tolerance = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(fused.tokens, plain.tokens, **tolerance)
        if unfold == "residual":
            torch.testing.assert_close(fused.residual, plain.residual, **tolerance)
        torch.testing.assert_close(fused.log_sizes, plain.log_sizes, rtol=1e-6, atol=0)
        expected = plain.restore(later), merge_tokens(tokens, groups), unfold_tokens(later, groups)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance)


def test_gradients():
    groups = groups_of(2, 7, 3)
    tokens = random_tokens((7,), 2, 2).double().requires_grad_()
    merged = random_tokens((3,), 2, 2, seed=1).double().requires_grad_()
    parts = members(groups)
    for with_residual in (False, True):
        assert gradcheck(lambda x, flag=with_residual: merge_op(x, *parts, flag)[: 1 + flag], tokens, fast_mode=True)
    for mean in (False, True):
        assert gradcheck(lambda x, flag=mean: reduce_members_op(x, *parts, flag), tokens, fast_mode=True)
        assert gradcheck(lambda x, flag=mean: spread_op(x, *parts, flag), merged, fast_mode=True)
    assert gradcheck(lambda x, y: restore_op(x, y, *parts), (merged, tokens), fast_mode=True)


@pytest.mark.parametrize("unfold", ["copy", "residual"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_plain_operations(unfold, dtype):
    groups, gradients = groups_of(2, 12, 5), []

    def gradient():
        tokens = random_tokens((12,), 2, 6).to(dtype).requires_grad_()
        reduction = reduce_to_groups(tokens, groups, unfold)
        assert not reduction.log_sizes.requires_grad
        back = reduction.restore(reduction.tokens.square())
        (back.sin() * reduction.spread(reduction.merge(tokens))).sum().backward()
        return tokens.grad

    gradients.append(gradient())
    with kernels():
        gradients.append(gradient())
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(*gradients, **tolerance)


def test_custom_operations_are_what_they_say():
    parts = members(groups_of(2, 7, 3))
    tokens, merged = random_tokens((7,), 2, 4).requires_grad_(), random_tokens((3,), 2, 4).requires_grad_()
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(merge_op, (tokens, *parts, True), test_utils=checks)
    torch.library.opcheck(reduce_members_op, (tokens, *parts, False), test_utils=checks)
    torch.library.opcheck(restore_op, (merged, tokens, *parts), test_utils=checks)
    torch.library.opcheck(spread_op, (merged, *parts, True), test_utils=checks)


def test_nothing_runs_beside_the_kernels():
    parts, tokens = members(groups_of(1, 9, 4)), random_tokens((9,))
    with OperationCounter() as counter:
        merged, residual, _ = merging.merge(tokens, *parts, True)
        restore(merged, residual, *parts)
    assert not plain_operations(counter)
