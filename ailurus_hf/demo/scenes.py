"""Street-like scenes with exact labels, drawn from a seed with numpy and Pillow only.

A scene is a small 3-D world (metres; x right, y up, z ahead of the camera) projected by a pinhole camera: a straight
road, pavements, rows of houses, then trees, poles, signs, cars and people painted from far to near. Every stroke goes
to the picture and to the label map alike, so the labels are exact, occlusion included; light, haze, blur and noise
touch the picture only. Classes share colours on purpose (grey road, pavement, walls, cars): colour does not tell them.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .scene_parts.painter import FAR, SUPERSAMPLE, WEATHERS, Camera, Label, Light, Painter, Street, fractal_noise
from .scene_parts.props import DRAWERS, cast_shadows, place_props
from .scene_parts.surroundings import paint_ground, paint_row, paint_sky, paint_skyline

CLASS_NAMES = tuple(label.name.lower() for label in Label)
PALETTE = (
    (142, 202, 230), (188, 143, 143), (94, 84, 142), (231, 196, 231), (82, 150, 85), (120, 120, 128), (255, 190, 11),
    (33, 104, 189), (214, 60, 78),
)  # fmt: skip

MIN_SIZE = 16
"""Smallest height and width of a scene, in pixels."""


@dataclass(frozen=True)
class Scene:
    """A picture and its labels.

    `image`: uint8 (height, width, 3), RGB. `labels`: uint8 (height, width), an index into `CLASS_NAMES` per pixel.
    """

    image: np.ndarray
    labels: np.ndarray


def draw_scene(seed: int, height: int = 256, width: int = 512) -> Scene:
    """Draw the scene of `seed`: the same arguments give the same pixels.

    Args:
        seed: any integer >= 0; it decides everything but the size.
        height: pixels, at least 16.
        width: pixels, at least 16.

    Raises:
        ValueError: `seed` is negative, or `height` or `width` is below 16.
    """
    if seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed}")
    for name, value in (("height", height), ("width", width)):
        if value < MIN_SIZE:
            raise ValueError(f"{name} must be at least {MIN_SIZE} pixels, got {value}")
    painter = _new_painter(np.random.default_rng(seed), height * SUPERSAMPLE, width * SUPERSAMPLE)
    paint_sky(painter)
    paint_skyline(painter)
    props = place_props(painter)
    paint_ground(painter, cast_shadows(painter, props))
    for side in (-1, 1):
        paint_row(painter, side)
    for prop in sorted(props, key=lambda p: -p.z):
        DRAWERS[prop.kind](painter, prop)
    return Scene(_develop(painter, height, width), np.asarray(painter.labels)[::SUPERSAMPLE, ::SUPERSAMPLE].copy())


def _new_painter(rng: np.random.Generator, height: int, width: int) -> Painter:
    """An empty canvas of height x width pixels, with the weather, street and camera that `rng` decides."""
    weather = WEATHERS[rng.choice(len(WEATHERS), p=(0.27, 0.2, 0.15, 0.16, 0.1, 0.12))]
    azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 0.95)
    level = math.cos(elevation)
    sun = (level * math.sin(azimuth), math.sin(elevation), level * math.cos(azimuth))
    road = rng.uniform(3.2, 5.8)
    crossing_from = rng.uniform(9, 45)
    has_crossing = rng.random() < 0.5
    crossing = (crossing_from, crossing_from + rng.uniform(6, 10)) if has_crossing else (FAR, FAR)
    street = Street(road, road + rng.uniform(3.2, 6.5), crossing)
    on_pavement = rng.random() < 0.15
    x = rng.choice((-1, 1)) * (road + 1.2) if on_pavement else rng.uniform(-0.6, 0.6) * road
    camera = Camera(
        focal=rng.uniform(0.8, 1.15) * math.sqrt(height * width / 2),
        x=float(x),
        height=rng.uniform(1.5, 2.6),
        horizon=rng.uniform(0.43, 0.58) * height,
        vanish=(0.5 + rng.uniform(-0.12, 0.12) - 0.02 * float(x)) * width,
    )
    return Painter(
        image=Image.new("RGB", (width, height)),
        labels=Image.new("L", (width, height), Label.SKY),
        camera=camera,
        light=Light(weather, sun),
        street=street,
        noise=fractal_noise(rng),
        rng=rng,
    )


def _develop(painter: Painter, height: int, width: int) -> np.ndarray:
    """Canvas -> photograph: box-filtered to size, tinted, vignetted, slightly soft and noisy."""
    rng = painter.rng
    small = painter.image.reduce(SUPERSAMPLE)
    softness = rng.uniform(0, 0.7) * math.sqrt(height * width) / 362
    small = small.filter(ImageFilter.GaussianBlur(softness))
    gain = np.asarray(painter.light.weather.tint, np.float32) * np.float32(rng.uniform(0.98, 1.18))
    picture = np.asarray(small, np.float32) * gain
    down, across = (np.linspace(-1, 1, size, dtype=np.float32) ** 2 for size in (height, width))
    picture *= (1 - np.float32(rng.uniform(0.02, 0.1)) * (down[:, None] + across))[..., None]
    picture += rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(1, 5))
    return np.clip(picture, 0, 255).astype(np.uint8)
