"""What `apply_ailurus` gains on models of transformers at their real sizes, with random weights.

python examples/benchmark_adapters.py depth_anything yolos --dtype bfloat16 --rounds 5

Plain and adapted runs take turns. "merging" is the share of the plain time that clustering, merging and unfolding take
at a quarter of the tokens, "outside" that of everything outside the vision encoder, which no merging can touch.
"""

import time
from copy import deepcopy
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    BeitConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    EomtConfig,
    EomtForUniversalSegmentation,
    Sam3ViTConfig,
    Sam3ViTModel,
    SamVisionConfig,
    SamVisionModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VitDetBackbone,
    VitDetConfig,
    YolosConfig,
    YolosForObjectDetection,
)  # fmt: skip

from ailurus_hf import apply_ailurus
from ailurus_hf.adapters import controller, map_layers
from ailurus_hf.benchmark import speed_up, time_side_by_side
from ailurus_hf.modeling import reduction

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
TAPS = {"out_indices": [5, 12, 18, 24], "reshape_hidden_states": False}
DINOV2_L = {**LARGE, "patch_size": 14, "image_size": 518}
BEIT_B = {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "image_size": 640}
DEPTH = {"patch_size": 14, "reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024]}
SAM_H = {
    "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "global_attn_indexes": [7, 15, 23, 31],
}  # fmt: skip
VITDET_B = {
    "image_size": 1024, "window_size": 14, "window_block_indices": [0, 1, 3, 4, 6, 7, 9, 10],
    "use_relative_position_embeddings": True,
}  # fmt: skip
# Where the time goes that merging costs: (module, name of a function).
MERGING = [
    (controller, "reduce_sequence"),
    (map_layers, "reduce"),
    (reduction, "merge_tokens"),
    (reduction, "_restore_sequence"),
    (reduction, "restore_groups"),
]
# Name -> model, and the height and width of its images.
MODELS = {
    "depth_anything": (  # V2 Large
        lambda: DepthAnythingForDepthEstimation(
            DepthAnythingConfig(backbone_config=Dinov2Config(**DINOV2_L, **TAPS), **DEPTH, fusion_hidden_size=256)
        ),
        (518, 518),
    ),
    "dpt": (lambda: DPTForDepthEstimation(DPTConfig(**LARGE, intermediate_size=4096)), (384, 384)),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINOV2_L)), (518, 518)),
    "dinov3_vit": (
        lambda: DINOv3ViTModel(
            DINOv3ViTConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_register_tokens=4)
        ),
        (1024, 1024),
    ),
    "yolos": (lambda: YolosForObjectDetection(YolosConfig(image_size=[800, 1344])), (800, 1344)),
    "eomt": (lambda: EomtForUniversalSegmentation(EomtConfig(**LARGE, num_labels=150)), (640, 640)),
    "sam": (lambda: SamVisionModel(SamVisionConfig()), (1024, 1024)),
    "sam_huge": (lambda: SamVisionModel(SamVisionConfig(**SAM_H)), (1024, 1024)),
    "vitdet": (lambda: VitDetBackbone(VitDetConfig(**VITDET_B)), (1024, 1024)),
    "sam3": (lambda: Sam3ViTModel(Sam3ViTConfig()), (1008, 1008)),
    "upernet_beit": (
        lambda: UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=BeitConfig(**BEIT_B, out_indices=[4, 6, 8, 12], reshape_hidden_states=True),
                num_labels=150,
            )
        ),
        (640, 640),
    ),
}


class Stopwatch:
    """Adds up the time spent in functions, those that call each other once, or between two hooks."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    def around(self, function):
        def timed(*arguments, **keywords):
            self.start()
            result = function(*arguments, **keywords)
            self.stop()
            return result

        return timed

    def start(self, *_):
        self.seconds -= time.perf_counter() if self.depth == 0 else 0.0
        self.depth += 1

    def stop(self, *_):
        self.depth -= 1
        self.seconds += time.perf_counter() if self.depth == 0 else 0.0


@torch.inference_mode()
def measure(name, rounds, dtype, compiled, grouping):
    """Seconds of every variant round by round, and the two shares; no shares where the variants are compiled."""
    build, size = MODELS[name]
    torch.manual_seed(0)
    plain, pixels = build().eval().to(dtype), torch.randn(1, 3, *size, dtype=dtype)
    variants = {"plain": plain}
    for ratio in (0.5, 0.25):
        variants[ratio] = apply_ailurus(deepcopy(plain), keep_ratio=ratio, grouping=grouping)
    adapter = controller.controllers_of(variants[0.25])[0]
    merging, encoder = Stopwatch(), Stopwatch()
    functions = [(place, function, getattr(place, function)) for place, function in MERGING]
    if compiled:
        functions = []
        for model in variants.values():
            model.compile()
    else:
        owner = next(module for module in plain.modules() if type(module) is type(adapter.owner))
        owner.register_forward_pre_hook(encoder.start)
        owner.register_forward_hook(encoder.stop)
    seconds = {variant: [] for variant in variants}
    for number in track(range(rounds + 1), name, console=Console(stderr=True)):
        for variant, model in variants.items():
            for place, function, original in functions:
                setattr(place, function, merging.around(original) if variant == 0.25 else original)
            seconds[variant] += time_side_by_side({"": lambda model=model: model(pixels)}, rounds=1, warmup=0)[""]
        if number == 0:  # warm-up
            seconds = {variant: [] for variant in variants}
            merging.seconds = encoder.seconds = 0.0
    for place, function, original in functions:
        setattr(place, function, original)
    total = sum(seconds["plain"])
    shares = [] if compiled else [merging.seconds / total, 1 - encoder.seconds / total]
    return seconds, shares


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Which of them; all by default.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each is run.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile plain and adapted models; no shares.")] = False,
    grouping: Annotated[str, typer.Option(help="region_merging, density_peaks or grid.")] = "region_merging",
) -> None:
    title = f"{dtype}, one image, {torch.get_num_threads()} threads" + ", compiled" * compiled
    table = Table(title=title, title_justify="left")
    shares = () if compiled else ("merging", "outside")
    for heading in ("model", "size", "plain ms", "half (quartiles)", "quarter (quartiles)", *shares):
        table.add_column(heading, justify="right")
    for name in models or MODELS:
        seconds, shares = measure(name, rounds, getattr(torch, dtype), compiled, grouping)
        gains = [speed_up(seconds["plain"], seconds[ratio]) for ratio in (0.5, 0.25)]
        table.add_row(
            name, "{} x {}".format(*MODELS[name][1]), f"{1e3 * median(seconds['plain']):.0f}",
            *(f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})" for gain in gains),
            *(f"{share:.1%}" for share in shares),
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
