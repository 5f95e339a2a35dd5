"""Speed of the plain and the adaptive encoder side by side, with random weights, and what the clustering costs.

python examples/benchmark_encoder.py --size small --dtype bfloat16 --compile

The plain model is the same code with keep_ratio 1, whose bits are those of transformers' ViT. Variants run in turn, so
that whatever else the machine does hits all of them.
"""

import copy
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from ailurus_hf import AiluRusConfig, AiluRusModel
from ailurus_hf.benchmark import count_flops, speed_up, time_side_by_side
from ailurus_hf.modeling.reduction import ReductionContext, reduce_sequence
from ailurus_hf.modeling.settings import resolve_num_groups

SIZES = {  # hidden size, layers, heads
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@torch.no_grad()
def main(
    size: Annotated[Literal["small", "base", "large"], typer.Option(help="ViT-S, -B or -L, patch 16.")] = "small",
    image_size: Annotated[int, typer.Option(help="Side of the image in pixels.")] = 640,
    batch_size: Annotated[int, typer.Option(help="Images per forward.")] = 1,
    keep_ratio: Annotated[list[float], typer.Option(help="Budget; repeat for several.")] = [0.5, 0.25],  # noqa: B006
    grouping: Annotated[str, typer.Option(help="region_merging, density_peaks or grid.")] = "region_merging",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Weights and images.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile; as CUDA graphs on a GPU.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each variant is timed.")] = 10,
) -> None:
    hidden, layers, heads = SIZES[size]
    config = AiluRusConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        image_size=image_size, grouping=grouping,
    )  # fmt: skip
    model = AiluRusModel(config).eval().to(device, getattr(torch, dtype))
    images = torch.randn(batch_size, 3, image_size, image_size).to(device, model.dtype)
    ratios = [1.0, *(ratio for ratio in keep_ratio if ratio != 1)]
    variants = {}
    mode = "reduce-overhead" if device.startswith("cuda") else "default"
    for ratio in ratios:
        twin = copy.deepcopy(model)
        twin.config.keep_ratio = ratio
        runner = torch.compile(twin, fullgraph=True, mode=mode) if compile else twin
        variants[f"{ratio:g}"] = lambda runner=runner: runner(images)
    hidden_states = model.embeddings(images)
    for layer in model.layers[: config.num_dense_layers]:
        hidden_states, _ = layer(hidden_states)

    def merge_and_unfold(ratio: float) -> None:
        num_tokens = config.grid_size[0] * config.grid_size[1]
        kept = resolve_num_groups(num_tokens, ratio)
        context = ReductionContext(norm=model.layers[config.num_dense_layers].layernorm_before)
        reduction = reduce_sequence(hidden_states, config.grid_size, kept, config, context, num_prefix=1)
        reduction.restore(reduction.tokens)

    for ratio in ratios[1:]:
        variants[f"merging {ratio:g}"] = lambda ratio=ratio: merge_and_unfold(ratio)
    seconds = time_side_by_side(variants, rounds, warmup=3)

    dense = seconds["1"]
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    title = f"ViT-{size}/16, {batch_size} x {image_size} x {image_size}, {dtype}, {where}"
    table = Table(title=title + (", compiled" if compile else ""), title_justify="left")
    for name in ("keep_ratio", "GFLOPs", "ratio", "ms", "speed-up (quartiles)", "cluster + merge + unfold", "of dense"):
        table.add_column(name, justify="right")
    flops = {ratio: count_flops(model, image_size, image_size, keep_ratio=ratio) for ratio in ratios}
    for ratio in ratios:
        gain, merging = speed_up(dense, seconds[f"{ratio:g}"]), median(seconds.get(f"merging {ratio:g}", [0.0]))
        table.add_row(
            f"{ratio:g}", f"{flops[ratio] / 1e9:.1f}", f"{flops[1.0] / flops[ratio]:.2f}",
            f"{median(seconds[f'{ratio:g}']) * 1e3:.1f}", f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})",
            f"{merging * 1e3:.2f} ms", f"{merging / median(dense):.2%}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
