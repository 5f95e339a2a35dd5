"""Train and measure the small segmentation model of `ailurus-hf demo` on drawn street scenes.

python examples/train_demo.py train          # about an hour on two CPU cores; writes ailurus_hf/demo/checkpoint
python examples/train_demo.py draw scenes    # pictures that it never saw, and their labels, for `ailurus-hf evaluate`
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ailurus_hf import AiluRusConfig, AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.demo.scenes import CLASS_NAMES, PALETTE, Scene, draw_scene

CHECKPOINT = Path(__file__).parents[1] / "ailurus_hf" / "demo" / "checkpoint"
CONFIG: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 3, "intermediate_size": 512, "patch_size": 8,
    "image_size": (128, 256), "position_interpolation": "bilinear", "keep_ratio": 1.0,
    "id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: index for index, name in enumerate(CLASS_NAMES)},
    "palette": [list(colour) for colour in PALETTE],
}  # fmt: skip
COMMON = {"use_cpu": True, "bf16": True, "weight_decay": 0.05, "remove_unused_columns": False}
COARSE = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr"}
COARSE |= {"lr_scheduler_kwargs": {"min_lr_rate": 0.2}, "warmup_steps": 200}
FINE = {"per_device_train_batch_size": 4, "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 10}
app = typer.Typer(add_completion=False)
prepare = AiluRusImageProcessor()


def draw_scenes(first: int, count: int) -> list[Scene]:
    """The scenes of seeds `first` .. `first + count - 1`, 256 x 512 pixels, drawn on all cores."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(draw_scene, range(first, first + count), chunksize=8))


def random_views(scenes: list[Scene], side: int, smallest: float, rng: np.random.Generator) -> BatchFeature:
    """A batch of crops, `smallest` to all of a scene's sides, flipped at random, resized to `side` x 2 `side`."""
    images, maps = [], []
    for image, labels in ((scene.image, scene.labels) for scene in scenes):
        share, flip = rng.uniform(smallest, 1), rng.choice((-1, 1))
        rows, columns = (round(side * share) for side in labels.shape)
        top, left = rng.integers(labels.shape[0] - rows + 1), rng.integers(labels.shape[1] - columns + 1)
        window = (slice(top, top + rows), slice(left, left + columns))
        images.append(image[window][:, ::flip].copy())
        maps.append(labels[window][:, ::flip].copy())
    return prepare(images, maps, do_resize=True, size={"height": side, "width": 2 * side}, return_tensors="pt")


def fit(model: PreTrainedModel, scenes: list[Scene], side: int, smallest: float, **settings: Any) -> None:
    """One run of `transformers.Trainer` on views of `side` x 2 `side` pixels."""
    pixels = np.bincount(np.concatenate([scene.labels[::8, ::8].ravel() for scene in scenes]), minlength=9) + 1
    # Rare classes weigh more: thin poles and small people count in the mean IoU as much as the sky.
    weights = torch.tensor((pixels.max() / pixels) ** 0.25, dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits.float(), labels, weights)

    views = partial(random_views, side=side, smallest=smallest, rng=np.random.default_rng(0))
    with TemporaryDirectory() as log:
        Trainer(model, TrainingArguments(log, **COMMON, **settings), views, scenes, compute_loss_func=loss).train()


@app.command()
def train(scenes: int = 4000, steps: int = 2600, fine_steps: int = 350, out: Path = CHECKPOINT) -> None:
    """Dense, in two stages: crops at half resolution, then whole scenes at full resolution, slower by a factor of 8."""
    set_seed(0)
    model, drawn = AiluRusForSemanticSegmentation(AiluRusConfig(**CONFIG)), draw_scenes(0, scenes)
    fit(model, drawn, 128, smallest=0.5, **COARSE, max_steps=steps)
    fit(model, drawn, 256, smallest=1.0, **FINE, max_steps=fine_steps)
    model.config.keep_ratio = 0.25  # what the demo loads; weights in float16, half the file, load as float32
    model.save_pretrained(out, state_dict={name: value.half() for name, value in model.state_dict().items()})
    prepare.save_pretrained(out)


@app.command()
def draw(out: Path, scenes: int = 200, first_seed: int = 1_000_000) -> None:
    """Write scenes with their label maps for `ailurus-hf evaluate`: OUT/images/SEED.png and OUT/labels/SEED.png."""
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for seed, scene in enumerate(draw_scenes(first_seed, scenes), start=first_seed):
        Image.fromarray(scene.image).save(out / "images" / f"{seed}.png")
        Image.fromarray(scene.labels).save(out / "labels" / f"{seed}.png")


if __name__ == "__main__":
    app()
