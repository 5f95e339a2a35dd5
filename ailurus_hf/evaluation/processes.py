"""The processes that were launched together, whoever told them of each other: torch.distributed or accelerate."""

import os
from typing import Any

import torch
from torch import distributed

from ..utils.extras import needs_extra

__all__ = ["gather", "process_place"]


def process_place() -> tuple[int, int]:
    """Index of this process, and how many there are.

    Raises:
        ValueError: several were launched, but the `PartialState` that exists takes this one for the only one.
    """
    if _is_distributed():
        return distributed.get_rank(), distributed.get_world_size()
    with needs_extra("eval", "evaluations on several processes"):
        from accelerate import PartialState

    # Without an accelerator the processes must be told to be on the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and state.num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but the PartialState or Accelerator that was made before knows one, "
            "so each would evaluate everything: on the CPU make it with PartialState(cpu=True) or Accelerator(cpu=True)"
        )
    return state.process_index, state.num_processes


def gather(values: list[Any]) -> list[Any]:
    """The lists of all processes one after the other, in each of them."""
    if _is_distributed():
        lists: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(lists, values)
        return [value for part in lists for value in part]
    with needs_extra("eval", "metrics of several processes"):
        from accelerate.utils import gather_object

    return gather_object(values)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
