"""Merged tokens that somebody caught inside a model, put back on the full grid."""

from typing import Any

from torch import Tensor, cat, nn

from .adapters.controller import controllers_of
from .modeling.token_groups import group_tokens, unfold_tokens


def restore(hidden_states: Tensor, source: Any, *, stage: int | None = None) -> Tensor:
    """Copy each merged token to all patches it stands for, in the order of the full grid.

    For whoever looks inside the layers, such as a hook on an attention module or an MLP. Outputs, hidden states and
    feature maps need it not, and neither do hooks on whole layers of an adapted model: those see the full grid.

    Args:
        hidden_states: (batch_size, prefix + M, any width), or (batch_size, 1, M, any width) inside encoders on maps;
            prefix counts class, distillation and register tokens, and whatever stands behind the patches.
        source: where it was caught: a model changed by `apply_ailurus`, while its forward runs; or what a model of this
            package returned, or anything else with its `assignment` and `group_sizes`.
        stage: which of the stages, for hierarchical outputs, which have a tuple of assignments.

    Returns:
        (batch_size, prefix + N, any width).

    Raises:
        ValueError: no forward of that model is running on merged tokens, or several are; or the number of tokens is not
            that of the source.
    """
    if hidden_states.ndim == 4:
        hidden_states = hidden_states[:, 0]
    if isinstance(source, nn.Module):
        running = [spread for controller in controllers_of(source) if (spread := controller.running_spread())]
        if len(running) != 1:
            raise ValueError(
                f"{len(running) or 'no'} forward of an adapted encoder in {type(source).__name__} is running on merged "
                "tokens: call restore in a hook inside the layers, with one encoder; of a model of this package give "
                "what it returned"
            )
        return running[0](hidden_states)
    assignment, sizes = source.assignment, source.group_sizes
    if stage is not None:
        assignment, sizes = assignment[stage], sizes[stage]
    num_prefix = hidden_states.shape[1] - sizes.shape[1]
    if num_prefix < 0:
        raise ValueError(f"expected at least {sizes.shape[1]} merged tokens, got {hidden_states.shape[1]}")
    prefix, merged = hidden_states.tensor_split([num_prefix], dim=1)
    return cat([prefix, unfold_tokens(merged, group_tokens(assignment, sizes.shape[1]))], dim=1)
