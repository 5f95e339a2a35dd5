"""One model timed plain and at several budgets, in turn, and what else its forward costs."""

import copy
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from ..adapters import map_layers
from ..budget import has_budget, with_budget
from ..modeling import reduction
from ..registry import architecture_of
from .flops import count_flops
from .operations import OperationCounter
from .timing import speed_up, time_side_by_side

__all__ = ["BenchmarkRow", "benchmark", "environment"]

Mode = Literal["eager", "compiled", "graph"]
Budget = dict[str, Any]
# Where the time goes that merging costs; those that call each other count once.
_MERGING = (
    reduction.reduce_sequence,
    map_layers.reduce,
    reduction.merge_tokens,
    reduction._restore_sequence,
    reduction.restore_groups,
)


@dataclass(frozen=True)
class BenchmarkRow:
    """What one variant of a model costs.

    Attributes:
        variant: "plain" or the budget's settings, and the attention implementation where one was chosen.
        gflops: of one image's forward, a multiply-add is two; None where they cannot be counted.
        ms, ms_low, ms_high: median and quartiles of the rounds, per batch.
        speed_up, speed_up_low, speed_up_high: over the fastest plain variant, round by round; None for that one.
        different: whether the quartiles of the speed-up leave out 1; a smaller difference is none.
        share_of_ideal: speed-up over the ratio of the FLOPs.
        grouping_share: seconds of grouping, merging and unfolding over the fastest plain variant's, timed apart; None
            where they are not visible one by one: compiled, in a CUDA graph, in training.
        launches: CUDA kernels of one run; elsewhere operations dispatched that are no views. None if compiled there.
        peak_mib: most memory allocated on the CUDA device during a run; None elsewhere.
    """

    model: str
    height: int
    width: int
    batch_size: int
    dtype: str
    mode: str
    train: bool
    variant: str
    gflops: float | None
    ms: float
    ms_low: float
    ms_high: float
    speed_up: float | None
    speed_up_low: float | None
    speed_up_high: float | None
    different: bool | None
    share_of_ideal: float | None
    grouping_share: float | None
    launches: int | None
    peak_mib: float | None
    images_per_second: float


def environment(device: str) -> dict[str, str | int]:
    """Hardware, versions and threads, to print beside the figures."""
    import transformers

    from .. import __version__

    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "ailurus_hf": __version__}
    return {"device": device, "hardware": name, "threads": torch.get_num_threads(), **versions}


def benchmark(
    name: str,
    model: Any,
    size: tuple[int, int],
    budgets: Sequence[Budget],
    *,
    plain: Any = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: Sequence[str] = (),
    mode: Mode = "eager",
    train: bool = False,
    rounds: int = 10,
    warmup: int = 2,
) -> list[BenchmarkRow]:
    """Time a model at several budgets beside the plain one; all variants take turns, round by round.

    Args:
        name: what the rows call the model.
        model: of this package, or changed by `apply_ailurus`; it is copied.
        size: height and width of the images, which are random.
        budgets: settings for `with_budget`, such as `{"keep_ratio": 0.5, "grouping": "grid"}`.
        plain: what it is compared with, with nothing merged; by default the model itself, LookupViT at the largest size
            of its training.
        batch_size, dtype, device: of the images, and of what is computed.
        attention: implementations to time every variant with; by default the model's own only.
        mode: "compiled" is `torch.compile` (as CUDA graphs on a GPU), "graph" captures the forward in a CUDA graph.
        train: time a training step with AdamW instead of a forward.
        rounds, warmup: how often each variant runs, timed and before that.

    Raises:
        ValueError: a budget is not allowed, or `mode` and `train` or `device` do not go together.
    """
    if mode == "graph" and (train or torch.device(device).type != "cuda"):
        raise ValueError(f"mode='graph' captures a forward on a CUDA device, got {device=} and {train=}; use 'eager'")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    pixels = torch.randn(batch_size, 3, *size, device=device, dtype=dtype)
    dense = model if plain is None else plain
    settings = [(dense, "plain", _dense_budget(dense)), *((model, _label(each), each) for each in budgets)]
    runs: dict[str, Callable[[], object]] = {}
    flops: dict[str, float | None] = {}
    plains = []
    for (network, label, budget), implementation in product(settings, attention or [""]):
        variant = f"{label}, {implementation}" if implementation else label
        if label == "plain":
            plains.append(variant)
        twin = copy.deepcopy(network).to(device, dtype).train(train)
        if implementation:
            twin.set_attn_implementation(implementation)
        flops[variant] = _gflops(network, size, budget)
        runs[variant] = _runner(twin, pixels, budget, mode, train)
    with torch.set_grad_enabled(train):
        seconds = time_side_by_side(runs, rounds, warmup)
        best = min(plains, key=lambda variant: float(np.median(seconds[variant])))
        plain_seconds = float(np.median(seconds[best]))
        rows = []
        for variant, run in runs.items():
            low, middle, high = np.quantile(seconds[variant], (0.25, 0.5, 0.75)).tolist()
            gain = None if variant == best else speed_up(seconds[best], seconds[variant])
            ours, ideal = flops[variant], flops[best]
            visible = mode == "eager" and not train and variant not in plains
            row = BenchmarkRow(
                model=name, height=size[0], width=size[1], batch_size=batch_size, dtype=str(dtype)[6:], mode=mode,
                train=train, variant=variant, gflops=ours, ms=1e3 * middle, ms_low=1e3 * low, ms_high=1e3 * high,
                speed_up=gain and gain.median, speed_up_low=gain and gain.low, speed_up_high=gain and gain.high,
                different=None if gain is None else not gain.low <= 1 <= gain.high,
                share_of_ideal=gain.median * ours / ideal if gain and ours and ideal else None,
                grouping_share=_merging_seconds(run) / plain_seconds if visible else None,
                launches=_launches(run, device, mode), peak_mib=_peak(run, device),
                images_per_second=batch_size / middle,
            )  # fmt: skip
            rows.append(row)
    return rows


def _dense_budget(model: Any) -> Budget:
    sizes = getattr(model.config, "compressed_sizes", None)
    if sizes is not None:
        return {"compressed_size": max(sizes, key=lambda size: size**2 if isinstance(size, int) else math.prod(size))}
    return {"keep_ratio": 1.0} if has_budget(model) else {}


def _label(budget: Budget) -> str:
    return " ".join(f"{name}={value}" for name, value in budget.items())


def _runner(model: Any, pixels: torch.Tensor, budget: Budget, mode: Mode, train: bool) -> Callable[[], object]:
    if mode == "compiled":
        model.compile(mode="reduce-overhead" if pixels.is_cuda else "default")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6) if train else None

    def run() -> object:
        with with_budget(model, **budget):
            output = model(pixels)
        if optimizer is not None:
            output[0].float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return output

    return _captured(run) if mode == "graph" else run


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as one launch."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = run()

    def replay(_: object = output) -> None:  # the outputs' memory is the graph's
        graph.replay()

    return replay


def _gflops(model: Any, size: tuple[int, int], budget: Budget) -> float | None:
    try:
        architecture_of(model.config)
    except TypeError:
        twin = copy.deepcopy(model).to("meta").eval()  # of another library: without the grouping's distances
        with torch.no_grad(), with_budget(twin, **budget), FlopCounterMode(display=False) as counter:
            twin(torch.empty(1, 3, *size, device="meta"))
        return float(counter.get_total_flops()) / 1e9
    return count_flops(model, *size, **budget) / 1e9


@contextmanager
def _replaced(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block the merging functions are wrapped, in every module of the package that has imported one."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("ailurus_hf.")]
    places = [
        (module, name, function)
        for module in modules
        for name, function in vars(module).items()
        if any(function is each for each in _MERGING)
    ]
    for module, name, function in places:
        setattr(module, name, wrap(function))
    try:
        yield
    finally:
        for module, name, function in places:
            setattr(module, name, function)


def _merging_seconds(run: Callable[[], object], rounds: int = 3) -> float:
    depth, total = 0, 0.0

    def wrap(function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth, total
            start = timer() if depth == 0 else 0.0
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                total += timer() - start if depth == 0 else 0.0

        return timed

    with _replaced(wrap):
        for _ in range(rounds):
            run()
    return total / rounds


def _launches(run: Callable[[], object], device: str, mode: Mode) -> int | None:
    if torch.device(device).type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            torch.cuda.synchronize()
        return sum(str(event.device_type).endswith("CUDA") for event in profile.events() or ())
    if mode != "eager":
        return None
    with OperationCounter() as counter:
        run()
    return counter.counts.total()


def _peak(run: Callable[[], object], device: str) -> float | None:
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) / 2**20
