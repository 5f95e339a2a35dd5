"""Compile every kernel for a GPU of the compute capability in the first argument, with the arguments that the package
launches it with; print which were, and which need more registers than there are."""

import json
import sys
from types import ModuleType

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction, mangle_type

from ailurus_hf.kernels import density_peaks, merging, region_merging, token_groups, unfolding

MODULES: list[ModuleType] = [density_peaks, merging, region_merging, token_groups, unfolding]
compiled, spilled = {}, []


def launch(kernel, like, grid, *arguments, num_warps, **constants):
    signature, values, attributes = {}, {}, {}
    for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if argument is None:
            signature[name], values[place,] = "constexpr", None
            continue
        signature[name] = mangle_type(argument)
        if isinstance(argument, torch.Tensor) or argument % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    for name, value in constants.items():
        signature[name], values[kernel.arg_names.index(name),] = "constexpr", value
    key = kernel.__name__, str(signature), str(values)
    if key not in compiled:
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        code = compile(ASTSource(kernel, signature, values, attributes), target=target, options=options).asm
        compiled[key] = bool(code["cubin"])
        if ".local" in code["ptx"]:
            spilled.append(kernel.__name__)


for module in MODULES:
    module.launch = launch
tokens = torch.zeros(1, 1600, 1024, dtype=torch.bfloat16)
groups = density_peaks.density_peaks(tokens, [40, 40], 800, 1, 50, 0.9)
region_merging.region_merging(torch.zeros(1, 1600, 64), [40, 40], 800)
members = groups[3], groups[4], groups[1], groups[0]
merged, residual, _ = merging.merge(tokens, *members, True)
merging.reduce_members(tokens, *members, False)
unfolding.restore(merged, residual, *members)
unfolding.spread(merged, *members, True)
kernels = {value.__name__ for m in MODULES for value in vars(m).values() if isinstance(value, JITFunction)}
kernels = {name for name in kernels if name.endswith("_kernel")}
print(json.dumps({"compiled": sorted({key[0] for key in compiled}), "kernels": sorted(kernels), "spilled": spilled}))
