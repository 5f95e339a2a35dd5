"""What all kernels share: when they can run, and how they are launched."""

import os
from typing import Any

import torch
from torch import Tensor

from ..modeling.token_groups import TokenGroups
from ..utils.extras import needs_extra

with needs_extra("kernels", "fused kernels"):
    import triton
    import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by triton too, when a kernel is defined
MOST_TOKENS = 2**16  # in an image: one program of region merging holds so many


def tile(on_gpu: int) -> int:
    """How many items a program takes, a power of 2: so many on a GPU. The interpreter runs one program after the other
    and takes a time for each operation, whatever its size: there, more."""
    return 16 * on_gpu if INTERPRETED else on_gpu


def can_run(*tensors: Tensor) -> bool:
    """Whether kernels can run on these tensors: all of them on one GPU, or on the CPU in triton's interpreter."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and next(iter(devices)).type == ("cpu" if INTERPRETED else "cuda")


def can_group(tokens: Tensor, num_tokens: int, num_groups: int) -> bool:
    """Whether the kernels group these tokens; what they do not, such as float64 and wrong arguments, is left to the
    plain operations and to their errors."""
    fits = tokens.ndim == 3 and tokens.shape[1] == num_tokens <= MOST_TOKENS and 1 <= num_groups < num_tokens
    return fits and tokens.dtype != torch.float64 and can_run(tokens)


def launch(kernel: Any, like: Tensor, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Run a kernel on the device of `like`. Products and sums are not fused, so that equal differences have equal
    squares, and the interpreter's bits are the GPU's."""
    if grid[-1] == 0:  # an empty batch
        return
    if like.device.type == "cpu":
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)


def rows(tokens: Tensor) -> Tensor:
    """Tokens whose features are beside each other, which is all that the kernels need."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def sum_dtype(dtype: torch.dtype) -> Any:
    """What the kernels sum tokens of a dtype in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def members(groups: TokenGroups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operations on groups are given of them; the kernels' own groups are contiguous already."""
    fields = groups.order, groups.starts, groups.sizes, groups.assignment
    order, starts, sizes, assignment = (field.contiguous() for field in fields)
    return order, starts, sizes, assignment


power_of_2 = triton.next_power_of_2
blocks = triton.cdiv
