"""Around the street: sky, skyline, the ground with its markings, rows of houses."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .painter import BRIGHT, FAR, NEAR, TURN, Camera, Label, Painter, Point, Prop, Street, wall_colour, wrap
from .props import draw_tree


def paint_sky(painter: Painter) -> None:
    """A gradient, a glow on the sun's side, and clouds that flatten towards the horizon."""
    weather, camera, rng = painter.light.weather, painter.camera, painter.rng
    width = painter.image.width
    rows = int(camera.horizon) + 2
    scale = 4  # clouds and gradients are smooth: a quarter of the resolution is enough
    small = (max(2, width // scale), max(2, rows // scale))
    down = np.linspace(0, 1, small[1], dtype=np.float32)[:, None] ** 0.8 + np.zeros(small[0], np.float32)
    low = down[..., None]
    colour = np.asarray(weather.top, np.float32) * (1 - low) + np.asarray(weather.low, np.float32) * low
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
    painter.polygon([*strip, (strip[1][0], camera.horizon + 2), (0, camera.horizon + 2)], (128, 128, 128), Label.ROAD)


def _paint_far_tree(painter: Painter, x: float, z: float, step: float) -> None:
    top = painter.rng.uniform(5, 11)
    outline = [(x + step * (0.5 + 0.7 * math.cos(a)), top * (0.45 + 0.55 * math.sin(a)), z) for a in TURN]
    painter.face(outline, (70 + painter.rng.uniform(-15, 15), 104, 62), Label.TREE, 0.9)
    painter.face(((x, 0, z), (x + step, 0, z), (x + step, 4, z), (x, 4, z)), (74, 104, 64), Label.TREE, 0.9)


def _paint_far_block(painter: Painter, x: float, z: float, step: float) -> None:
    top = painter.rng.uniform(6, 30)
    box = ((x, 0, z), (x + step, 0, z), (x + step, top, z), (x, top, z))
    painter.face(box, wall_colour(painter.rng), Label.BUILDING, painter.light.factor((0, 0, -1)))


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
    painter.labels.paste(Image.fromarray(np.where(road, Label.ROAD, Label.PAVEMENT).astype(np.uint8)), (0, top))


def _ground_colours(rng: np.random.Generator) -> np.ndarray:
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


def _road_index(rng: np.random.Generator, street: Street, x: np.ndarray, z: np.ndarray) -> np.ndarray:
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


def _paving_index(rng: np.random.Generator, street: Street, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Slabs (3), joints (4), kerb (5) and a strip of other slabs (6)."""
    slab, joint = rng.uniform(0.5, 1.4), rng.uniform(0.03, 0.08)
    out = np.abs(x)
    row = np.floor(z / slab)
    lines = (np.mod(z, slab) < joint) | (np.mod(out + 0.5 * slab * np.mod(row, 2), slab) < joint)
    kerb = out < street.road + 0.22
    strip = np.abs(out - street.kerb + 0.8) < 0.3
    return np.where(kerb, 5, np.where(lines & (z < 30), 4, np.where(strip, 6, 3))).astype(np.uint8)


_ROOFS = ((120, 62, 50), (84, 80, 84), (96, 70, 58), (70, 78, 92), (140, 78, 56))


class _House(NamedTuple):
    """A house: materials (float32 (12, 3), rows as in `_facade_index`); floor height, bay width and top in metres;
    window width and height as shares of a bay and of a floor.
    """

    materials: np.ndarray
    floor: float
    bay: float
    window: tuple[float, float]
    top: float
    shop: bool
    brick: bool
    seed: int


def _new_house(painter: Painter) -> _House:
    """Draw lots for a house's looks; at dusk some of its windows are lit."""
    rng, lamps = painter.rng, painter.light.weather.lamps
    wall = np.asarray(wall_colour(rng), np.float32)
    trim = np.clip(wall * rng.uniform(1.1, 1.3) + 18, 0, 250)
    awning, door = BRIGHT[rng.integers(len(BRIGHT))], BRIGHT[rng.integers(len(BRIGHT))]
    panes = np.asarray(((58, 72, 88), (92, 112, 130), (134, 156, 172), (74, 80, 84)), np.float32)
    if lamps:
        panes[rng.integers(0, 4, 2)] = (255, 206, 120)
    shop = (255, 222, 160) if lamps else (104, 122, 132)
    stripe = np.asarray(awning) * 0.5 + 110
    rows = (wall, wall * 0.88, trim, *panes, np.asarray(door) * 0.8, shop, awning, stripe, wall * 0.7)
    floor = rng.uniform(2.9, 3.7)
    return _House(
        materials=np.asarray([np.asarray(row, np.float32) for row in rows], np.float32),
        floor=floor,
        bay=rng.uniform(1.7, 3.4),
        window=(rng.uniform(0.36, 0.72), rng.uniform(0.42, 0.68)),
        top=floor * rng.choice((1, 2, 3, 4, 6), p=(0.1, 0.32, 0.3, 0.18, 0.1)) + rng.uniform(0.3, 1.0),
        shop=bool(rng.random() < 0.45),
        brick=bool(rng.random() < 0.45),
        seed=int(rng.integers(1000)),
    )


def paint_row(painter: Painter, side: int) -> None:
    """One side of the street (-1 left, 1 right), far to near: houses, small parks, nothing along the crossing road."""
    near, far = painter.street.crossing
    z, lots = NEAR, []
    while z < FAR:
        end = z + painter.rng.uniform(6, 15)
        if near - 2 < z < far + 1:
            z = far + 1
            continue
        if z < near < end:
            end = near - 0.5
        lots.append((z, end))
        z = end
    for begin, end in reversed(lots):
        if painter.rng.random() < 0.22:
            _paint_park(painter, side, begin, end)
        else:
            _paint_house(painter, side, begin, end)


def _paint_park(painter: Painter, side: int, begin: float, end: float) -> None:
    """An empty lot with a few trees, drawn here because nearer houses hide them."""
    rng = painter.rng
    for z in sorted(rng.uniform(begin + 1, end - 0.5, rng.integers(0, 4)), reverse=True):
        x = side * (painter.street.kerb + rng.uniform(1.5, 7))
        draw_tree(painter, Prop("tree", x, max(z, 3.0), rng.uniform(4, 8), 0.0, int(rng.integers(2**31))))


def _paint_house(painter: Painter, side: int, begin: float, end: float) -> None:
    """Roof first, then the gable wall that faces the camera, then the wall along the street: later hides earlier."""
    rng, house = painter.rng, _new_house(painter)
    x = side * (painter.street.kerb + rng.uniform(0, 0.8))
    depth, rise = 9.0 * side, rng.uniform(1.5, 4.0) if rng.random() < 0.5 else 0.0
    ridge, top = x + depth / 2, house.top
    roof = np.asarray(_ROOFS[rng.integers(len(_ROOFS))]) + rng.uniform(-10, 10, 3)
    if rise:
        slope = ((x, top, begin), (x, top, end), (ridge, top + rise, end), (ridge, top + rise, begin))
        painter.face(slope, roof, Label.BUILDING, painter.light.factor((-0.5 * side, 0.85, 0)))
        _paint_chimney(painter, x + depth * 0.3, top + rise * 0.6, rng.uniform(begin, end))
        gable = ((x, top, begin), (ridge, top + rise, begin), (x + depth, top, begin))
        painter.face(gable, house.materials[1], Label.BUILDING, painter.light.factor((0, 0, -1)))
    _paint_wall(painter, house, ((x, begin), (x + depth, begin)))
    _paint_wall(painter, house, ((x, begin), (x, end)))


def _paint_chimney(painter: Painter, x: float, base: float, z: float) -> None:
    box = ((x - 0.4, base, z), (x + 0.4, base, z), (x + 0.4, base + 1.6, z), (x - 0.4, base + 1.6, z))
    painter.face(box, (130, 84, 70), Label.BUILDING, painter.light.factor((0, 0, -1)))


def _paint_wall(painter: Painter, house: _House, ends: tuple[Point, Point]) -> None:
    """A wall between two ground points (x, z): along the street (same x) or across it (same z)."""
    (x0, z0), (x1, z1) = ends
    corners = painter.camera.project(((x0, 0, z0), (x1, 0, z1), (x1, house.top, z1), (x0, house.top, z0)))
    left, top, right, bottom = painter.clip(corners)
    if right - left < 1 or bottom - top < 1:
        return
    z, along, up = _wall_coordinates(painter.camera, ends, (left, top, right, bottom))
    index = _facade_index(house, along, up, detailed=float(z.min()) < 18)
    normal = (-1.0 if x0 > 0 else 1.0, 0.0, 0.0) if x0 == x1 else (0.0, 0.0, -1.0)
    factor, middle = painter.light.factor(normal), float(z.mean())
    colours = np.asarray([painter.shade(row, middle, factor) for row in house.materials], np.float32)
    stain = wrap(painter.noise, up * 12, (along + house.seed) * 12)
    gain = (1 + 0.08 * stain) * (0.84 + 0.16 * np.clip(up / 3, 0, 1))
    texture = np.minimum(colours[index] * gain[..., None], 255).astype(np.uint8)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).polygon([(u - left, v - top) for u, v in corners], fill=255)
    painter.paste(texture, mask, (left, top), Label.BUILDING)


def _wall_coordinates(
    camera: Camera, ends: tuple[Point, Point], box: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the wall seen at each canvas pixel of `box`: distance z and metres along the wall (w,), metres up (h, w)."""
    ((x0, z0), (x1, z1)), (left, top, right, bottom) = ends, box
    columns = np.arange(left, right, dtype=np.float32) + np.float32(0.5) - np.float32(camera.vanish)
    if x0 == x1:
        z = camera.focal * (x0 - camera.x) / np.where(np.abs(columns) < 1, 1, columns)
        z = np.clip(z, min(z0, z1), max(z0, z1))
        along = z - z0
    else:
        z = np.full_like(columns, z0)
        along = np.abs(camera.x - x0 + columns * (z0 / camera.focal))
    rows = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5) - np.float32(camera.horizon)
    up = camera.height - rows * (z / camera.focal)
    return z.astype(np.float32), along.astype(np.float32), up.astype(np.float32)


def _facade_index(house: _House, along: np.ndarray, up: np.ndarray, detailed: bool) -> np.ndarray:
    """Material of each wall pixel at `along` (w,) and `up` (h, w) metres.

    0 wall, 1 darker wall, 2 trim, 3-6 panes, 7 door, 8 shop window, 9 and 10 awning, 11 plinth.
    """
    bay, level = np.floor(along / house.bay), np.floor(up / house.floor)
    across, rise = np.abs(along / house.bay - bay - 0.5), up / house.floor - level
    wide, tall = house.window[0] / 2, house.window[1] / 2
    out = np.abs(rise - 0.52)
    open_floor = (level >= 1) & (up < house.top - 0.5)
    pane = ((bay * 7 + level * 13 + house.seed * (1 + np.mod(bay * level, 5))) % 4).astype(np.uint8) + 3
    index = np.zeros(up.shape, np.uint8)
    if detailed and house.brick:
        course = np.floor(up / 0.24)
        index[(np.mod(up, 0.24) < 0.05) | (np.mod(along + 0.3 * np.mod(course, 2), 0.6) < 0.06)] = 1
    frame = open_floor & (across < wide + 0.035) & (out < tall + 0.04)
    glass = open_floor & (across < wide) & (out < tall) & ((across > 0.015) | (wide < 0.2))
    index[frame] = 2
    index[glass] = pane[glass]
    index[(up > house.top - 0.35) | ((level >= 1) & (rise < 0.05))] = 2
    ground = level < 1
    if house.shop:
        _fit_shop(index, ground, along, up, across, rise)
    else:
        shown = ground & (across < wide) & (out < tall)
        index[shown] = pane[shown]
        index[up < 0.5] = 11
    index[ground & (np.mod(bay + house.seed, 3) == 0) & (across < 0.24) & (rise < 0.72)] = 7
    return index


def _fit_shop(
    index: np.ndarray, ground: np.ndarray, along: np.ndarray, up: np.ndarray, across: np.ndarray, rise: np.ndarray
) -> None:
    """Shop windows with a streak of reflected light, and a striped awning above, written into `index` in place."""
    show = ground & (across < 0.45) & (rise > 0.14) & (rise < 0.64)
    index[show] = 8
    index[show & (np.mod(along - 0.7 * up, 2.6) < 0.3)] = 5
    stripe = np.where(np.mod(along, 0.6) < 0.3, 9, 10).astype(np.uint8) + np.zeros(up.shape, np.uint8)
    awning = ground & (rise > 0.68) & (rise < 0.86)
    index[awning] = stripe[awning]
