"""Speed of LookupViT beside the plain ViT of its depth and width, at every compressed size, with random weights.

python examples/benchmark_lookupvit.py --image-size 224 --image-size 384 --batch-size 1

The plain model is this package's with keep_ratio 1, whose bits are those of transformers' ViT, without a class token.
Variants of one image and batch size run in turn, so that whatever else the machine does hits all of them.
"""

from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from ailurus_hf import AiluRusConfig, AiluRusModel, LookupViTConfig, LookupViTModel
from ailurus_hf.benchmark import count_flops, speed_up, time_side_by_side

# ViT-B/16
SHAPE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
IMAGE_SIZES, BATCH_SIZES, SIZES = [224, 384], [1, 16], [3, 5, 7, 10, 16]


def measure(
    image_size: int, batch_size: int, sizes: list[int], rounds: int, where: dict[str, Any]
) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one image and batch size: the plain model, and every compressed size that fits the grid."""
    side = image_size // SHAPE["patch_size"]
    sizes = [size for size in sizes if size <= side]
    vit = AiluRusConfig(**SHAPE, intermediate_size=3072, image_size=image_size, use_cls_token=False, keep_ratio=1.0)
    plain = AiluRusModel(vit).eval().to(**where)
    config = LookupViTConfig(**SHAPE, image_size=image_size, compressed_sizes=sizes, compressed_size=sizes[0])
    model = LookupViTModel(config).eval().to(**where)
    images = torch.randn(batch_size, 3, image_size, image_size, **where)
    variants: dict[str, Callable[[], object]] = {"plain": lambda: plain(images)}
    flops = {"plain": count_flops(plain, image_size, image_size)}
    for size in sizes:
        variants[f"{size} x {size}"] = lambda size=size: model(images, compressed_size=size)
        flops[f"{size} x {size}"] = count_flops(model, image_size, image_size, compressed_size=size)
    seconds = time_side_by_side(variants, rounds, warmup=1)
    for name in variants:
        gain = speed_up(seconds["plain"], seconds[name])
        ratio, quartiles = (
            f"{flops['plain'] / flops[name]:.2f}",
            f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        )
        costs = f"{flops[name] / 1e9:.1f}", ratio, f"{median(seconds[name]) * 1e3:.0f}", quartiles
        yield f"{image_size}", f"{batch_size}", name, *costs


@torch.no_grad()
def main(
    image_size: Annotated[list[int], typer.Option(help="Side in pixels; repeat for several.")] = IMAGE_SIZES,
    batch_size: Annotated[list[int], typer.Option(help="Images per forward; repeat for several.")] = BATCH_SIZES,
    compressed_size: Annotated[list[int], typer.Option(help="Those that fit; repeat for several.")] = SIZES,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Weights and images.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    rounds: Annotated[int, typer.Option(help="How often each variant is timed.")] = 10,
) -> None:
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    table = Table(title=f"ViT-B/16, {dtype}, {where}", title_justify="left")
    for name in ("pixels", "batch", "compressed", "GFLOPs", "FLOP ratio", "ms", "speed-up (quartiles)"):
        table.add_column(name, justify="right")
    for pixels, images in product(image_size, batch_size):
        for row in measure(pixels, images, compressed_size, rounds, {"device": device, "dtype": getattr(torch, dtype)}):
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
