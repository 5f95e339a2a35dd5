"""What the tests in the interpreter share."""

import math
from contextlib import contextmanager

import torch
from triton.runtime.interpreter import InterpretedFunction

from ailurus_hf.kernels import disable, enable
from ailurus_hf.modeling.reduction import reduce
from ailurus_hf.modeling.settings import AdaptiveResolutionSettings


def random_tokens(grid, batch_size=1, hidden_size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, math.prod(grid), hidden_size, generator=generator)


def constant_tokens(grid, batch_size=1):
    return torch.full((batch_size, math.prod(grid), 20), 0.1)


def duplicated_tokens(grid, batch_size=1):
    """Three different tokens: ties everywhere."""
    different = random_tokens((3,), batch_size)
    places = torch.randint(0, 3, (math.prod(grid),), generator=torch.Generator().manual_seed(1))
    return different[:, places]


def whole_numbers(grid, batch_size=1):
    """Two features: a sum of two squares is the same in any order, so that kernels must decide as plain operations."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 4, (batch_size, math.prod(grid), 2), generator=generator).float()


MAKERS = [random_tokens, constant_tokens, duplicated_tokens, whole_numbers]


@contextmanager
def kernels():
    """Within the block the kernels are on; gives the names of those launched."""
    launched, plain = [], InterpretedFunction.run

    def run(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return plain(self, *args, **kwargs)

    InterpretedFunction.run = run
    enable()
    try:
        yield launched
    finally:
        disable()
        InterpretedFunction.run = plain


def plain_operations(counter):
    """What an `OperationCounter` has counted, without how the interpreter hands tensors to kernels."""
    return {name: count for name, count in counter.counts.items() if name not in ("set_", "copy_")}


def both(tokens, grid, num_groups, **settings):
    """The reduction by plain operations, and by kernels, which must have run."""
    settings = AdaptiveResolutionSettings(**settings)
    plain = reduce(tokens, grid, num_groups, settings)
    with kernels() as launched:
        fused = reduce(tokens, grid, num_groups, settings)
    assert "_groups_kernel" in launched
    return plain, fused
