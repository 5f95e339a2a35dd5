"""Where SegFormer's time goes, and what merging tokens in its stages saves. Random weights: only costs are measured.

python examples/benchmark_segformer.py --size b2 --size b5 --rounds 7

Prints, for each size, a table of floating-point operations and one of wall time, per stage and for the head, and the
speed-up over the dense model with the quartiles of the rounds. All variants run once in every round, so that whatever
else the machine does hits all of them.
"""

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ailurus_hf import AiluRusSegformerConfig, AiluRusSegformerForSemanticSegmentation
from ailurus_hf.benchmark import speed_up, time_side_by_side

DEPTHS = {"b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3), "b4": (3, 8, 27, 3), "b5": (3, 6, 40, 3)}
BUDGETS = [(1, 1, 1, 1), (1, 1, 0.5, 0.5), (1, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (1, 1, 0.25, 0.25),
           (0.25, 0.25, 0.25, 0.25)]  # fmt: skip
PARTS = ["stage 1", "stage 2", "stage 3", "stage 4", "head"]


def main(
    size: Annotated[list[str], typer.Option(help="MiT size, b1 to b5; repeat for several.")] = ["b2", "b5"],  # noqa: B006
    height: int = 512,
    width: int = 1024,
    rounds: int = 7,
    grouping: str = "region_merging",
    cluster_layer: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    for name in size:
        shape = {
            "depths": DEPTHS[name], "hidden_sizes": (64, 128, 320, 512), "num_attention_heads": (1, 2, 5, 8),
            "decoder_hidden_size": 768, "num_labels": 19,
        }  # fmt: skip
        config = AiluRusSegformerConfig(**shape, grouping=grouping, cluster_layer=cluster_layer, upsample_logits=False)
        settings = {"device": device, "dtype": getattr(torch, dtype)}
        model = AiluRusSegformerForSemanticSegmentation(config).to(**settings).eval().requires_grad_(False)
        native = SegformerForSemanticSegmentation(SegformerConfig(**shape)).to(**settings).eval().requires_grad_(False)
        measure(f"MiT-{name.upper()}", model, native, torch.randn(1, 3, height, width, **settings), rounds)


@torch.no_grad()
def measure(title: str, model: nn.Module, native: nn.Module, pixels: torch.Tensor, rounds: int) -> None:
    """Count and time all variants and print the tables."""
    clocks: dict[str, list[list[float]]] = {}
    flops: dict[str, list[float]] = {}
    variants: dict[str, Callable[[], object]] = {}
    for budget in ("transformers", *BUDGETS):
        label = budget if isinstance(budget, str) else " ".join(f"{ratio:g}" for ratio in budget)
        network = native if budget == "transformers" else model

        def run(network: nn.Module = network, budget: str | tuple[float, ...] = budget, label: str = label) -> None:
            if network is model:
                network.config.stage_keep_ratios = budget
            clocks.setdefault(label, []).append(timed_parts(network, pixels))

        network.set_attn_implementation("eager")  # the counter knows matrix products, not the CPU's fused attention
        with FlopCounterMode(display=False) as counter:
            run()
        network.set_attn_implementation("sdpa")
        counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        flops[label] = [counts.get(f"{type(network).__name__}.{part}", 0) / 1e9 for part in parts_of(network)]
        variants[label] = run
    seconds = time_side_by_side(variants, rounds=rounds, warmup=1)
    where = f"{title}, {pixels.shape[2]} x {pixels.shape[3]}, {torch.get_num_threads()} threads, {pixels.dtype}"
    times = {label: np.median(clocks[label][-rounds:], axis=0) * 1e3 for label in variants}
    print_table(f"{where}: GFLOPs (a multiply-add is two)", {k: [*v, sum(v)] for k, v in flops.items()}, "{:.1f}")
    gains = {label: speed_up(seconds["1 1 1 1"], seconds[label]) for label in variants}
    text = {label: f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})" for label, gain in gains.items()}
    totals = {label: [*times[label], np.median(seconds[label]) * 1e3] for label in variants}
    print_table(f"{where}: milliseconds, medians of {rounds} rounds", totals, "{:.0f}", text)


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """Stages and head by the name of the module."""
    stages = {f"segformer.stages.{index}": stage for index, stage in enumerate(network.segformer.stages)}
    return {**stages, "decode_head": network.decode_head}


def timed_parts(network: nn.Module, pixels: torch.Tensor) -> list[float]:
    """Run the model and return the seconds of each stage and of the head."""
    marks: list[float] = []

    def mark(*_: object) -> None:
        if pixels.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    hooks = [part.register_forward_pre_hook(mark) for part in parts_of(network).values()]
    hooks += [part.register_forward_hook(mark) for part in parts_of(network).values()]
    network(pixels)
    for hook in hooks:
        hook.remove()
    return [end - start for start, end in zip(marks[::2], marks[1::2], strict=True)]


def print_table(title: str, rows: dict[str, list[float]], form: str, gains: dict[str, str] | None = None) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("kept per stage", *PARTS, "whole", *(["speed-up (quartiles)"] if gains else [])):
        table.add_column(name, justify="right")
    for label, values in rows.items():
        table.add_row(label, *(form.format(value) for value in values), *([gains[label]] if gains else []))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
