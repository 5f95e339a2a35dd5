"""What a training step costs at several budgets, side by side, and where its time goes.

python examples/benchmark_training.py MODEL --height 360 --width 480 --batch-size 4 --bf16

Random pixels and labels, AdamW, gradient clipping. Every round runs one step of each budget, so that whatever else the
machine does hits all of them. "frozen" trains only the layers that run on merged tokens, and the head.
"""

import copy
import time
from itertools import pairwise
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForSemanticSegmentation

import ailurus_hf  # noqa: F401  registers the models
from ailurus_hf.benchmark import speed_up
from ailurus_hf.training import SegmentationLoss, freeze_layers

PARTS = ("forward", "loss", "backward", "optimizer")


class Step:
    """One optimizer step at a budget, with the time of its parts."""

    def __init__(self, model, keep_ratio, frozen, bf16):
        self.model, self.bf16 = copy.deepcopy(model).train(), bf16
        self.model.config.keep_ratio = keep_ratio
        freeze_layers(self.model, model.config.num_dense_layers if frozen else 0)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-6, fused=True)
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.loss, self.times, self.saved = SegmentationLoss(), [], 0

    def run(self, pixel_values, labels):
        self.seen = {}
        marks = [_now()]
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.bf16):
                outputs = self.model(pixel_values)
            marks.append(_now())
            loss = self.loss(outputs, labels)
        marks.append(_now())
        loss.backward()
        marks.append(_now())
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(_now())
        self.saved = sum(self.seen.values())
        self.times.append([after - before for before, after in pairwise(marks)])

    def _count(self, tensor):
        storage = tensor.untyped_storage()  # what is kept for the backward pass, each storage once
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def _now():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def main(
    model: str,
    height: int = 360,
    width: int = 480,
    batch_size: int = 4,
    keep_ratio: Annotated[list[float], typer.Option(help="Budget; repeat for several.")] = [0.5, 0.25],  # noqa: B006
    bf16: bool = False,
    rounds: int = 10,
) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = AutoModelForSemanticSegmentation.from_pretrained(model).to(device)
    pixels = torch.randn(batch_size, 3, height, width, device=device)
    labels = torch.randint(network.config.num_labels, (batch_size, height, width), device=device)
    budgets = [(1.0, False), *((ratio, frozen) for ratio in keep_ratio for frozen in (False, True))]
    steps = {budget: Step(network, *budget, bf16) for budget in budgets}
    for _ in track(range(rounds + 1), console=Console(stderr=True)):
        for step in steps.values():
            step.run(pixels, labels)
    totals = {budget: [sum(parts) for parts in step.times[1:]] for budget, step in steps.items()}
    precision = "bfloat16" if bf16 else "float32"
    title = f"{batch_size} x {height} x {width}, {precision}, {device}, {torch.get_num_threads()} threads"
    table = Table(title=title, title_justify="left")
    for name in ("keep_ratio", "ms per step", *PARTS, "activations MiB", "times as fast (quartiles)"):
        table.add_column(name, justify="right")
    for budget, step in steps.items():
        gain = speed_up(totals[1.0, False], totals[budget])
        parts = [f"{1e3 * median(times):.0f}" for times in zip(*step.times[1:], strict=True)]
        table.add_row(
            f"{budget[0]:g}{' frozen' if budget[1] else ''}", f"{1e3 * median(totals[budget]):.0f}", *parts,
            f"{step.saved / 2**20:.0f}", f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
