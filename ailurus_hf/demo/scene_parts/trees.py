"""Trees: a trunk, and a crown cut out of noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ailurus_hf.demo.scene_parts.painter import TREE, Bools, Bytes, Colour, Floats, Painter, Prop, wrap

_LEAF_DETAIL = 70.0  # noise cells per metre of half a crown
_LEAVES = (
    (74, 120, 58), (96, 138, 60), (58, 104, 72), (122, 140, 62), (196, 122, 44), (178, 74, 50), (206, 168, 62),
)  # fmt: skip


def draw_tree(painter: Painter, prop: Prop) -> None:
    """Trunk and a crown cut out of noise: holes and a ragged edge show what is behind."""
    rng = np.random.default_rng(prop.seed)
    x, z, size = prop.x, prop.z, prop.size
    trunk, base = size * 0.03 + 0.06, size * rng.uniform(0.28, 0.4)
    bark = np.asarray((98, 76, 58)) + rng.uniform(-18, 18, 3)
    fork = size * 0.65
    outline = ((x - trunk, 0, z), (x + trunk, 0, z), (x + trunk * 0.6, fork, z), (x - trunk * 0.6, fork, z))
    painter.face(outline, bark, TREE, painter.light.factor((0, 0.3, -0.8)))
    wide, tall = 1.3 * size * rng.uniform(0.24, 0.4), 1.3 * (size - base) / 2
    (left, top), (right, bottom) = painter.camera.project(((x - wide, base + 2 * tall, z), (x + wide, base, z)))
    box = painter.clip(((left, top), (right, bottom)))
    if box[2] - box[0] < 2 or box[3] - box[1] < 2:
        return
    u = (np.arange(box[0], box[2], dtype=np.float32) + 0.5 - left) / (right - left)
    v = ((np.arange(box[1], box[3], dtype=np.float32) + 0.5 - top) / (bottom - top))[:, None]
    leaves, tones = _crown(painter, u, v, (wide, tall), rng)
    palette = [painter.shade(c, z, painter.light.factor((0, 0.6, -0.4))) for c in _leaf_tones(rng)]
    mask = Image.fromarray(leaves.astype(np.uint8) * 255)
    painter.paste(np.asarray(palette, np.uint8)[tones], mask, (box[0], box[1]), TREE)


def _crown(
    painter: Painter, u: Floats, v: Floats, size: tuple[float, float], rng: np.random.Generator
) -> tuple[Bools, Bytes]:
    """Where leaves are and how bright (0-4), both (h, w), at `u` (w,) and `v` (h, 1), 0-1 across and down the box."""
    at = rng.integers(0, 256, 2).astype(np.float32)
    coarse = wrap(painter.noise, v * 48 + at[0], u * 48 + at[1])
    fine = wrap(painter.noise, v * (size[1] * _LEAF_DETAIL) + at[1], u * (size[0] * _LEAF_DETAIL) + at[0])
    half = 1 - rng.choice((0.0, 0.0, 0.75)) * (1 - v)  # one tree in three tapers to a point
    reach = ((2 * u - 1) / np.maximum(half, 0.08)) ** 2 + (2 * v - 1) ** 2
    leaves = reach + 0.42 * coarse + 0.45 * fine < 0.54
    sun = painter.light.sun
    bright = 0.5 + 0.3 * (2 * u - 1) * sun[0] - 0.45 * (2 * v - 1) + 0.55 * fine - 0.35 * coarse
    return leaves, np.clip(bright * 5, 0, 4).astype(np.uint8)


def _leaf_tones(rng: np.random.Generator) -> list[Colour]:
    """Five tones of one foliage, dark to light: greens mostly, autumn at times."""
    chosen = rng.choice(len(_LEAVES), p=(0.24, 0.2, 0.18, 0.14, 0.09, 0.07, 0.08))
    base = np.asarray(_LEAVES[chosen]) + rng.uniform(-12, 12, 3)
    return [base * gain + lift for gain, lift in ((0.62, 0), (0.8, 2), (1.0, 6), (1.18, 12), (1.3, 28))]
