"""Small labelled data sets on disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NUM_LABELS = 4
IGNORE = 9


def labelled_picture(seed: int, height: int = 40, width: int = 56) -> tuple[Image.Image, np.ndarray]:
    """A picture whose colours tell the class of each pixel, and its classes; some pixels are ignored."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(NUM_LABELS, size=(-(-height // 8), -(-width // 8)))
    labels = np.kron(blocks, np.ones((8, 8), dtype=np.int64))[:height, :width]
    colours = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (190, 190, 60)])
    pixels = (colours[labels] + rng.integers(-20, 20, size=(height, width, 3))).clip(0, 255).astype(np.uint8)
    labels = labels.copy()
    labels[: rng.integers(1, height // 2)] = IGNORE
    return Image.fromarray(pixels), labels


def write_labels(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8)).save(path)


def write_camvid(root: Path, train: int = 6, val: int = 3, size: tuple[int, int] = (40, 56)) -> Path:
    """ROOT/{train,val}/{images,labels} and ROOT/classes.json; lossless pictures."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        for number in range(count):
            image, labels = labelled_picture(first + number, *size)
            (root / split / "images").mkdir(parents=True, exist_ok=True)
            image.save(root / split / "images" / f"{number:03}.png")
            write_labels(root / split / "labels" / f"{number:03}.png", labels)
    classes = {"id2label": {index: f"class {index}" for index in range(NUM_LABELS)}, "ignore_index": IGNORE}
    (root / "classes.json").write_text(json.dumps({**classes, "palette": [[60 * i] * 3 for i in range(NUM_LABELS)]}))
    return root
