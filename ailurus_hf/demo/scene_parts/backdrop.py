"""Behind and below the street: sky, skyline, and the ground with its markings."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ailurus_hf.demo.scene_parts.painter import (
    BUILDING,
    FAR,
    PAVEMENT,
    ROAD,
    TREE,
    TURN,
    Bytes,
    Colour,
    Floats,
    Painter,
    Street,
    wall_colour,
    wrap,
)


def _mix(a: Colour, b: Colour, amount: Floats) -> Floats:
    """Blend two colours by an amount 0..1 of any shape (...): float32 (..., 3)."""
    share = amount[..., None]
    return np.asarray(a, np.float32) * (1 - share) + np.asarray(b, np.float32) * share


def paint_sky(painter: Painter) -> None:
    """A gradient, a glow on the sun's side, and clouds that flatten towards the horizon."""
    weather, camera, rng = painter.light.weather, painter.camera, painter.rng
    width = painter.image.width
    rows = int(camera.horizon) + 2
    scale = 4  # clouds and gradients are smooth: a quarter of the resolution is enough
    small = (max(2, width // scale), max(2, rows // scale))
    down = np.linspace(0, 1, small[1], dtype=np.float32)[:, None] ** 0.8 + np.zeros(small[0], np.float32)
    colour = _mix(weather.top, weather.low, down)
    across = np.linspace(-1, 1, small[0], dtype=np.float32) - np.float32(painter.light.sun[0])
    glow = np.exp(-3 * across**2) * down * (0.35 if painter.light.sun[2] > 0 else 0.1)
    colour += glow[..., None] * np.float32(60)
    left, top = rng.uniform(0, 100, 2)
    box = (left, top, left + 150, top + rng.uniform(60, 150))
    clouds = np.asarray(Image.fromarray(painter.noise).resize(small, Image.Resampling.BILINEAR, box=box))
    cover = rng.uniform(*weather.cloudiness)
    amount = np.clip((clouds + 1.2 * cover - 0.75) * 1.6, 0, 0.9) * (1 - 0.5 * down)
    lit = np.asarray(weather.cloud, np.float32) - 40 * np.clip(clouds[..., None] * cover, 0, 1)
    colour += (lit - colour) * amount[..., None]
    sky = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
    painter.image.paste(sky.resize((width, rows), Image.Resampling.BICUBIC), (0, 0))


def paint_skyline(painter: Painter) -> None:
    """What closes the street: hazy blocks, or a line of trees."""
    rng, camera = painter.rng, painter.camera
    trees = rng.random() < 0.35
    for z in (FAR * 1.6, FAR * 1.25):
        x = -160.0
        while x < 160:
            step = rng.uniform(5, 12) if trees else rng.uniform(8, 22)
            (_paint_far_tree if trees else _paint_far_block)(painter, x, z, step)
            x += step
    # The ground starts at the horizon; without this strip rounding could leave sky between them.
    strip = [(0.0, camera.horizon - 1), (float(painter.image.width), camera.horizon - 1)]
    painter.polygon([*strip, (strip[1][0], camera.horizon + 2), (0, camera.horizon + 2)], (128, 128, 128), ROAD)


def _paint_far_tree(painter: Painter, x: float, z: float, step: float) -> None:
    top = painter.rng.uniform(5, 11)
    outline = [(x + step * (0.5 + 0.7 * math.cos(a)), top * (0.45 + 0.55 * math.sin(a)), z) for a in TURN]
    painter.face(outline, (70 + painter.rng.uniform(-15, 15), 104, 62), TREE, 0.9)
    painter.face(((x, 0, z), (x + step, 0, z), (x + step, 4, z), (x, 4, z)), (74, 104, 64), TREE, 0.9)


def _paint_far_block(painter: Painter, x: float, z: float, step: float) -> None:
    top = painter.rng.uniform(6, 30)
    box = ((x, 0, z), (x + step, 0, z), (x + step, top, z), (x, top, z))
    painter.face(box, wall_colour(painter.rng), BUILDING, painter.light.factor((0, 0, -1)))


def paint_ground(painter: Painter, shadows: Image.Image) -> None:
    """Road, markings, kerb and paving, textured in ground metres so that they shrink with distance."""
    camera, street, rng = painter.camera, painter.street, painter.rng
    width, height = painter.image.size
    top = int(camera.horizon) + 1
    if top >= height:
        return
    ys, xs = np.arange(top, height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    z = np.float32(camera.focal * camera.height) / np.maximum(ys + 0.5 - np.float32(camera.horizon), 0.25)
    x = np.float32(camera.x) + (xs - np.float32(camera.vanish)) * (z / np.float32(camera.focal))
    near, far = street.crossing
    side_road = (z > near) & (z < far)
    road = (np.abs(x) < street.road) | side_road
    index = np.where(road, _road_index(rng, street, x, z), _paving_index(rng, street, x, z))
    fog = 1 - np.exp(-np.minimum(z, FAR * 2) / np.float32(painter.light.weather.haze))
    lit = painter.light.factor((0, 1, 0))
    shade = np.asarray(shadows, np.float32)[top:] / np.float32(255)
    grain = wrap(painter.noise, z * 23, x * 23)
    stain = wrap(painter.noise, z * 4, x * 9)
    factor = lit * shade * (1 + 0.07 * grain * np.exp(-z / 14) + 0.09 * stain) * (1 - fog)
    colour = _ground_colours(rng)[index] * factor[..., None]
    colour += np.asarray(painter.light.weather.low, np.float32) * fog[..., None]
    painter.image.paste(Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)), (0, top))
    painter.labels.paste(Image.fromarray(np.where(road, ROAD, PAVEMENT).astype(np.uint8)), (0, top))


def _ground_colours(rng: np.random.Generator) -> Floats:
    """One row per ground material: asphalt, paint, patch, paving, joint, kerb, tactile strip."""
    grey, warm = rng.uniform(88, 150), rng.uniform(-8, 12)
    stone, hue = rng.uniform(118, 196), rng.uniform(-4, 24)
    paint = rng.uniform(205, 240)
    rows = (
        (grey + warm, grey, grey - warm),
        (paint, paint, paint * rng.uniform(0.75, 1.0)),
        (grey * 0.86, grey * 0.86, grey * 0.88),
        (stone + hue, stone, stone - hue),
        (stone * 0.82 + hue, stone * 0.82, stone * 0.82 - hue),
        (stone * 1.12, stone * 1.12, stone * 1.1),
        (stone * 0.92 + hue, stone * 0.88, stone * 0.84),
    )
    return np.asarray(rows, np.float32)


def _road_index(rng: np.random.Generator, street: Street, x: Floats, z: Floats) -> Bytes:
    """Asphalt (0), paint (1) and patches (2)."""
    near, far = street.crossing
    inside = (z > near - 4) & (z < far + 4)
    dash = (np.mod(z, 6.0) < 3.2) if rng.random() < 0.75 else z > 0
    middle = (np.abs(x) < 0.09) & dash & ~inside
    edges = (np.abs(np.abs(x) - (street.road - 0.35)) < 0.06) & ~inside & bool(rng.random() < 0.5)
    stripes = (np.mod(x + 0.3, 1.1) < 0.6) & (np.abs(x) < street.road - 0.3)
    start = near - 3.6 if near < FAR else rng.uniform(5, 40)
    zebra = stripes & (z > start) & (z < start + 3) & bool(rng.random() < 0.8)
    left, begin = rng.uniform(-street.road, street.road - 1), rng.uniform(3, 20)
    patch = (x > left) & (x < left + rng.uniform(0.8, 2)) & (z > begin) & (z < begin + rng.uniform(2, 8))
    return np.where(middle | edges | zebra, 1, np.where(patch, 2, 0)).astype(np.uint8)


def _paving_index(rng: np.random.Generator, street: Street, x: Floats, z: Floats) -> Bytes:
    """Slabs (3), joints (4), kerb (5) and a strip of other slabs (6)."""
    slab, joint = rng.uniform(0.5, 1.4), rng.uniform(0.03, 0.08)
    out = np.abs(x)
    row = np.floor(z / slab)
    lines = (np.mod(z, slab) < joint) | (np.mod(out + 0.5 * slab * np.mod(row, 2), slab) < joint)
    kerb = out < street.road + 0.22
    strip = np.abs(out - street.kerb + 0.8) < 0.3
    return np.where(kerb, 5, np.where(lines & (z < 30), 4, np.where(strip, 6, 3))).astype(np.uint8)
