"""How many operations a merged forward runs beside those of a plain one: at batch 1 a GPU waits for their launches."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ailurus_hf import AiluRusModel
from ailurus_hf.benchmark.operations import OperationCounter, is_view
from ailurus_hf.modeling import grouping_region_merging
from ailurus_hf.modeling.reduction import GROUPINGS, reduce
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings
from tests.factories import tiny_model

# What a grouping adds on 40 x 40 tokens, of which half are kept; these numbers only go down.
MOST_OPERATIONS = {"density_peaks": 69, "region_merging": 439, "grid": 13}


def operations(**settings):
    """Of the second forward, in which the tables that depend on the grid alone are there."""
    model = tiny_model(AiluRusModel, cluster_layer=3, **settings).to("meta")
    pixel_values = torch.empty(1, 3, 320, 320, device="meta")
    with torch.no_grad():
        model(pixel_values)
        with OperationCounter() as counter:
            model(pixel_values)
    return counter.counts.total()


def added(grouping, **settings):
    return operations(grouping=grouping, keep_ratio=0.5, **settings) - operations(keep_ratio=1)


@pytest.mark.parametrize("grouping", list(GROUPINGS))
def test_a_merged_forward_adds_few_operations(grouping):
    found = added(grouping)
    assert found <= MOST_OPERATIONS[grouping], f"{grouping} adds {found} operations"


@pytest.mark.parametrize("num_rounds", [4, 6, 8, 12])
def test_rounds_are_short(num_rounds, monkeypatch):
    monkeypatch.setattr(grouping_region_merging, "NUM_ROUNDS", num_rounds)
    assert added("region_merging") <= 35 * num_rounds + 30


def test_the_counter_counts_work_and_no_views():
    layer, tokens = nn.Linear(4, 4), torch.randn(2, 3, 4)
    with torch.no_grad(), OperationCounter() as counter:
        tokens.transpose(1, 2).unsqueeze(0).expand(5, -1, -1, -1)[..., 1:].detach()
        tokens.contiguous().reshape(6, 4).float()
    assert not counter.counts
    with OperationCounter() as counter:
        layer(tokens).add_(1).relu_()
        tokens.transpose(1, 2).reshape(8, 3)
        torch.zeros(2)
    assert counter.counts == {"addmm": 1, "add_": 1, "relu_": 1, "clone": 1, "zeros": 1}


class LargestResult(TorchDispatchMode):
    """Within the block, notes the most elements of any operation's result that is no view."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not is_view(func):
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("grouping", ["density_peaks", "region_merging"])
def test_no_result_is_as_large_as_an_activation_of_the_mlp(grouping):
    """Off the CPU nothing is cut to fit a cache, and a table of all neighbours' features would be 12 times as much."""
    tokens = torch.empty(2, 1600, 384, device="meta")
    settings = AdaptiveResolutionSettings(grouping=grouping)
    reduce(tokens, (40, 40), 800, settings)
    with LargestResult() as results:
        reduce(tokens, (40, 40), 800, settings)
    assert 0 < results.most < 4 * tokens.numel()
