"""How often `torch.compile` compiles: one graph a forward, and a bounded number over budgets."""

import pytest
import torch

from ailurus_hf import AiluRusModel
from ailurus_hf.modeling.reduction import GROUPINGS
from tests.factories import random_images, tiny_model

pytestmark = pytest.mark.slow


class Counting:
    """A backend that compiles nothing and counts its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("grouping", list(GROUPINGS))
def test_one_graph_for_each_budget_and_none_for_its_return(backend, grouping):
    model = tiny_model(AiluRusModel, keep_ratio=0.5, grouping=grouping)
    compiled, images = torch.compile(model, backend=backend, fullgraph=True, dynamic=False), random_images(1, 48, 48)
    for _ in range(2):
        for keep_ratio in (0.5, 0.25):
            model.config.keep_ratio = keep_ratio
            expected = model(images).last_hidden_state
            torch.testing.assert_close(compiled(images).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert backend.graphs == 2
