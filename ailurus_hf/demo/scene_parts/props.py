"""What stands on the street: where it goes, how it is drawn, and the shadows that it and the houses cast."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .painter import (
    BRIGHT,
    FAR,
    NEAR,
    SUPERSAMPLE,
    TURN,
    WALLS,
    Colour,
    Label,
    Painter,
    Point,
    Point3,
    Prop,
    Street,
    wrap,
)


class _Placer:
    """Collects props, leaving free the crossing road and the space right before the camera."""

    def __init__(self, painter: Painter) -> None:
        self.camera, self.street, self.rng = painter.camera, painter.street, painter.rng
        self.props: list[Prop] = []

    def add(self, kind: str, x: float, z: float, size: float, heading: float = 0.0) -> None:
        """One more prop, unless it would fill the picture."""
        if z > 2.5 and abs(x - self.camera.x) + z > 5:
            self.props.append(Prop(kind, x, z, size, heading, int(self.rng.integers(2**31))))

    def is_clear(self, z: float) -> bool:
        """Whether nothing crosses the street at `z` metres."""
        return not self.street.crossing[0] - 1 < z < self.street.crossing[1] + 1

    def furnish(self, side: int) -> None:
        """Trees, lamps, signs and people on the pavement of one side (-1 left, 1 right)."""
        rng, street = self.rng, self.street
        row = side * (street.road + 0.7)
        trees, lamps = rng.random() < 0.7, rng.random() < 0.85
        for z in np.arange(rng.uniform(4, 12), 90, rng.uniform(6, 13)):
            if trees and self.is_clear(z) and rng.random() < 0.8:
                self.add("tree", row + side * rng.uniform(0, 0.6), z + rng.uniform(-1, 1), rng.uniform(4.5, 9))
        for z in np.arange(rng.uniform(4, 16), 90, rng.uniform(13, 24)):
            if lamps and self.is_clear(z):
                self.add("lamp", row - side * 0.2, z, rng.uniform(4.5, 7), 0.0 if side < 0 else math.pi)
        for z in rng.uniform(4, 30, rng.integers(1, 4)):
            self.add("sign", row - side * rng.uniform(0, 0.3), z, rng.uniform(2.3, 3.1))
        for z in 4 + 36 * rng.random(rng.integers(2, 8)) ** 1.5:
            x = side * rng.uniform(street.road + 0.5, street.kerb - 0.3)
            self.add("person", x, z, rng.choice((1.15, 1.6, 1.75, 1.9)))

    def drive(self, side: int) -> None:
        """Parked cars along the kerb of one side, and traffic in its lane; one drives on the right."""
        rng, heading = self.rng, 0.0 if side > 0 else math.pi
        if rng.random() < 0.55:
            for z in np.arange(rng.uniform(5, 14), 70, rng.uniform(5.5, 9)):
                if self.is_clear(z) and rng.random() < 0.75:
                    self.add("car", side * (self.street.road - 1.05), z, rng.uniform(0.94, 1.08), heading)
        for z in np.arange(rng.uniform(7, 30), 90, rng.uniform(10, 22)):
            if rng.random() < 0.5:
                self.add("car", side * self.street.road * 0.32, z, rng.uniform(0.94, 1.08), heading)

    def cross(self) -> None:
        """A car on the crossing road, and people who cross the street before it."""
        rng, (near, far) = self.rng, self.street.crossing
        if near < FAR and rng.random() < 0.7:
            self.add("car", rng.uniform(-9, 9), (near + far) / 2, 1.0, rng.choice((-1, 1)) * math.pi / 2)
        for _ in range(rng.integers(0, 4)):
            x = rng.uniform(-1, 1) * self.street.road
            z = near - 2.2 if near < FAR else rng.uniform(8, 35)
            self.add("person", x, z, rng.uniform(1.5, 1.9))


def place_props(painter: Painter) -> list[Prop]:
    """Everything that stands on the street, in no particular order."""
    placer = _Placer(painter)
    for side in (-1, 1):
        placer.furnish(side)
        placer.drive(side)
    placer.cross()
    return placer.props


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
    painter.face(outline, bark, Label.TREE, painter.light.factor((0, 0.3, -0.8)))
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
    painter.paste(np.asarray(palette, np.uint8)[tones], mask, (box[0], box[1]), Label.TREE)


def _crown(
    painter: Painter, u: np.ndarray, v: np.ndarray, size: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
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


def _draw_lamp(painter: Painter, prop: Prop) -> None:
    """A street lamp: post, arm over the road and lantern. `heading` 0 points the arm to +x, pi to -x."""
    rng = np.random.default_rng(prop.seed)
    x, z, top, side = prop.x, prop.z, prop.size, math.cos(prop.heading)
    colour = np.asarray(((70, 74, 78), (120, 122, 120), (48, 70, 62))[rng.integers(3)])
    factor = painter.light.factor((0.3 * side, 0, -0.9))
    _draw_post(painter, x, z, top, 0.11, colour)
    arm = ((x, top - 0.1, z), (x + 1.2 * side, top + 0.12, z), (x + 1.2 * side, top + 0.28, z), (x, top + 0.08, z))
    painter.face(arm, colour, Label.POLE, factor)
    glow = (255, 240, 190) if painter.light.weather.lamps else (200, 200, 190)
    low, high = (x + 0.9 * side, top - 0.02, z), (x + 1.7 * side, top + 0.1, z)
    painter.face((low, high, (x + 1.6 * side, top + 0.32, z), (x + side, top + 0.3, z)), colour, Label.POLE, factor)
    painter.face((low, high, (x + 1.6 * side, top - 0.02, z), (x + side, top - 0.1, z)), glow, Label.POLE)


def _draw_post(painter: Painter, x: float, z: float, top: float, half: float, colour: Colour) -> None:
    """A round post: a lit and a shaded half, at least one final pixel wide."""
    half = max(half, 0.55 * SUPERSAMPLE * z / painter.camera.focal)
    for a, b in ((-half, 0.0), (0.0, half)):
        outline = ((x + a, 0, z), (x + b, 0, z), (x + b * 0.8, top, z), (x + a * 0.8, top, z))
        painter.face(outline, colour, Label.POLE, painter.light.factor((math.copysign(0.8, a + b), 0, -0.6)))


_PLATES = (
    ((250, 250, 250), (200, 32, 40), 16), ((200, 32, 40), (250, 250, 250), 8), ((250, 250, 250), (200, 32, 40), 3),
    ((30, 90, 180), (245, 245, 245), 4), ((240, 190, 40), (40, 40, 40), 4), ((30, 90, 180), (245, 245, 245), 16),
    ((36, 120, 70), (245, 245, 245), 4),
)  # fmt: skip


def _draw_sign(painter: Painter, prop: Prop) -> None:
    """A traffic sign on a thin post: border, plate and a simple symbol."""
    rng = np.random.default_rng(prop.seed)
    inner, border, corners = _PLATES[rng.integers(len(_PLATES))]
    x, z, radius = prop.x, prop.z, rng.uniform(0.38, 0.6)
    y, wide = prop.size, rng.uniform(1.0, 1.5) if corners == 4 else 1.0
    _draw_post(painter, x, z, y, 0.05, (128, 130, 132))
    factor = 0.3 + 0.7 * painter.light.factor((0, 0, -1))
    start = math.pi / 2 if corners == 3 else math.pi / corners
    for scale, colour in ((1.0, border), (0.8, inner), (0.3, border)):
        angles = [start + 2 * math.pi * i / corners for i in range(corners)]
        outline = [(x + scale * radius * wide * math.cos(a), y + scale * radius * math.sin(a), z) for a in angles]
        painter.face(outline, colour, Label.SIGN, factor)


def _draw_person(painter: Painter, prop: Prop) -> None:
    """Legs in mid-stride, torso, arms, head and hair, from the proportions of a standing figure."""
    rng = np.random.default_rng(prop.seed)
    tall, z, stride = prop.size, prop.z, rng.uniform(-0.16, 0.16)
    shirt, trousers = (np.asarray((BRIGHT + WALLS)[rng.integers(20)]) * rng.uniform(0.6, 1.1) for _ in range(2))
    skin = np.asarray((236, 196, 164)) * rng.uniform(0.45, 1.0)
    hair = np.asarray(((60, 44, 36), (36, 32, 32), (150, 110, 60), (170, 168, 166))[rng.integers(4)])
    factor = painter.light.factor((0, 0.3, -0.8))

    def part(points: Sequence[Point], colour: Colour, gain: float = 1.0) -> None:
        painter.face([(prop.x + tall * u, tall * v, z) for u, v in points], colour, Label.PERSON, factor * gain)

    def oval(v: float, wide: float, high: float, colour: Colour) -> None:
        part([(wide * math.cos(a), v + high * math.sin(a)) for a in TURN], colour)

    for way, gain in ((1, 0.8), (-1, 1.0)):
        foot = way * stride
        hip = way * 0.02
        part(((hip - 0.05, 0.5), (hip + 0.05, 0.5), (foot + 0.035, 0.0), (foot - 0.035, 0.0)), trousers, gain)
        part(((foot - 0.04, 0.0), (foot + 0.06, 0.0), (foot + 0.05, 0.035), (foot - 0.04, 0.04)), (40, 36, 34))
        hand = way * 0.13 - foot * 0.7
        part(((way * 0.1, 0.81), (way * 0.14, 0.79), (hand + 0.03, 0.45), (hand - 0.03, 0.45)), shirt, gain * 0.9)
    hem = 0.09 if rng.random() < 0.7 else 0.14
    part(((-0.12, 0.8), (-0.06, 0.845), (0.06, 0.845), (0.12, 0.8), (hem, 0.44), (-hem, 0.44)), shirt)
    oval(0.925, 0.058, 0.075, hair)
    oval(0.905, 0.05, 0.062, skin)


Place = Callable[[float, float, float], Point3]
"""From a point of the car (metres forwards, up, to its right) to a point of the world."""

_PROFILES = (
    ((-2.1, 0.3), (-2.15, 0.75), (-1.95, 0.95), (-1.35, 1.0), (-0.8, 1.42), (0.55, 1.45), (1.2, 0.98), (2.05, 0.8),
     (2.1, 0.3)),
    ((-1.85, 0.3), (-1.9, 0.8), (-1.7, 1.1), (-1.4, 1.5), (0.5, 1.52), (1.15, 1.02), (1.8, 0.85), (1.9, 0.3)),
    ((-2.4, 0.3), (-2.45, 1.0), (-2.4, 1.15), (-2.25, 2.0), (1.1, 2.05), (1.75, 1.2), (2.3, 1.0), (2.35, 0.3)),
)  # fmt: skip
_PAINTS = ((184, 40, 40), (38, 84, 150), (225, 226, 228), (60, 62, 68), (150, 154, 158), (206, 170, 70), (56, 110, 90),
           (120, 48, 60), (170, 196, 210), (34, 36, 40), (210, 200, 180))  # fmt: skip


def draw_car(painter: Painter, prop: Prop) -> None:
    """A car extruded from a side profile; strips facing the camera from far to near, then the visible flank."""
    rng = np.random.default_rng(prop.seed)
    profile = _PROFILES[rng.integers(len(_PROFILES))]
    paint = np.asarray(_PAINTS[rng.integers(len(_PAINTS))]) + rng.uniform(-12, 12, 3)
    cos, sin, half = math.cos(prop.heading), math.sin(prop.heading), 0.88

    def place(along: float, up: float, out: float) -> Point3:
        right, ahead = sin * along + cos * out, cos * along - sin * out
        return prop.x + prop.size * right, prop.size * up, prop.z + prop.size * ahead

    for start, stop in sorted(itertools.pairwise(profile), key=lambda s: -place(s[0][0] + s[1][0], 0, 0)[2]):
        _draw_strip(painter, place, start, stop, half, paint)
    side = 1.0 if cos * (painter.camera.x - prop.x) + sin * prop.z > 0 else -1.0
    _draw_flank(painter, place, profile, side * half, paint, (side * cos, 0.0, -side * sin))


def _draw_strip(painter: Painter, place: Place, start: Point, stop: Point, half: float, paint: Colour) -> None:
    """One strip of the skin, across the car between two profile points; nothing when it faces away from the camera."""
    (a, ya), (b, yb) = start, stop
    length = math.hypot(b - a, yb - ya)
    origin = place(0, 0, 0)
    tip = place(-(yb - ya) / length, (b - a) / length, 0)
    normal = (tip[0] - origin[0], tip[1] - origin[1], tip[2] - origin[2])
    centre = place((a + b) / 2, (ya + yb) / 2, 0)
    towards = (painter.camera.x - centre[0], painter.camera.height - centre[1], -centre[2])
    if sum(n * t for n, t in zip(normal, towards, strict=True)) <= 0:
        return
    glass = min(ya, yb) > 0.9 and abs(yb - ya) > 0.35
    face = [place(a, ya, -half), place(a, ya, half), place(b, yb, half), place(b, yb, -half)]
    painter.face(face, (64, 80, 96) if glass else paint, Label.CAR, painter.light.factor(normal))
    if abs(a - b) < 0.12 and min(ya, yb) < 0.5:
        _draw_bumper(painter, place, a + (0.01 if a > 0 else -0.01), half, max(ya, yb))


def _draw_bumper(painter: Painter, place: Place, a: float, half: float, top: float) -> None:
    """Lights, number plate and the dark strip below, at the end `a` of the car (negative: the rear)."""
    lamps = painter.light.weather.lamps
    light = ((250, 245, 220) if a > 0 else (255, 60, 50)) if lamps else ((225, 228, 230) if a > 0 else (176, 30, 34))

    def box(left: float, right: float, low: float, high: float, colour: Colour) -> None:
        corners = (place(a, low, left), place(a, low, right), place(a, high, right), place(a, high, left))
        painter.face(corners, colour, Label.CAR)

    box(-half, half, 0.22, 0.36, (40, 42, 44))
    box(-half, -half + 0.4, top - 0.2, top - 0.02, light)
    box(half - 0.4, half, top - 0.2, top - 0.02, light)
    box(-0.26, 0.26, 0.42, 0.54, (225, 222, 205))


def _draw_flank(
    painter: Painter, place: Place, profile: Sequence[Point], out: float, paint: Colour, normal: Point3
) -> None:
    """One side of the car: body, side windows, two wheels."""
    factor = painter.light.factor(normal)
    painter.face([place(a, y, out) for a, y in profile], paint, Label.CAR, factor)
    cabin = [(a, y) for a, y in profile if y > 0.97]
    middle = sum(a for a, _ in cabin) / len(cabin)
    low = min(y for _, y in cabin)
    window = [place(middle + 0.85 * (a - middle), low + 0.04 + 0.82 * (y - low), out) for a, y in cabin]
    painter.face(window, (58, 70, 84), Label.CAR, 0.4 + 0.6 * factor)
    top = max(y for _, y in cabin)
    post = ((middle - 0.05, low), (middle + 0.05, low), (middle + 0.05, top), (middle - 0.05, top))
    painter.face([place(a, y, out) for a, y in post], paint, Label.CAR, factor)
    for along in (profile[0][0] + 0.75, profile[-1][0] - 0.75):
        for radius, colour in ((0.34, (34, 34, 36)), (0.19, (150, 152, 156))):
            rim = [place(along + radius * math.cos(a), 0.33 + radius * math.sin(a), out * 1.01) for a in TURN]
            painter.face(rim, colour, Label.CAR, factor)


DRAWERS: dict[str, Callable[[Painter, Prop], None]] = {
    "tree": draw_tree, "lamp": _draw_lamp, "sign": _draw_sign, "car": draw_car, "person": _draw_person,
}  # fmt: skip


Outline = tuple[Point3, ...]


def cast_shadows(painter: Painter, props: Sequence[Prop]) -> Image.Image:
    """Light on the ground, mode L, of the canvas' size: cast shadows when the sun is out, contact shadows always."""
    width, height = painter.image.size
    half = Image.new("L", (width // 2, height // 2), 255)  # soft anyway: half the resolution is enough
    draw = ImageDraw.Draw(half)
    sun, strength = painter.light.sun, min(1.0, 2.2 * painter.light.weather.sun)
    dark, contact = int(255 - 112 * strength), int(255 - 60 - 60 * strength)
    slope = (-sun[0] / sun[1], -sun[2] / sun[1])

    def fill(points: Sequence[Point3], value: int) -> None:
        ground = [(x + y * slope[0], 0.0, max(z + y * slope[1], NEAR)) for x, y, z in points]
        draw.polygon([(u / 2, v / 2) for u, v in painter.camera.project(ground)], fill=value)

    for outline in _row_outlines(painter.street, slope[0]):
        fill(outline, dark)
    for prop in props:
        for outline in _SILHOUETTES[prop.kind](prop):
            fill(outline, dark)
        fill(_footprint(prop), contact)
    half = half.filter(ImageFilter.GaussianBlur(max(0.6, height / 400)))
    return half.resize((width, height), Image.Resampling.BILINEAR)


def _row_outlines(street: Street, slope: float) -> list[Outline]:
    """The street side of the rows of houses that stand between the sun and the street, as if all were equally high."""
    near, far = street.crossing
    top = 9.0
    outlines: list[Outline] = []
    for side in (-1, 1):
        x = side * street.kerb
        for begin, end in ((NEAR, near - 1), (far + 1, FAR)):
            if end > begin and slope * side < 0:
                outlines.append(((x, 0.0, begin), (x, 0.0, end), (x, top, end), (x, top, begin)))
    return outlines


def _footprint(prop: Prop) -> Outline:
    """The ellipse of ground that the prop itself keeps dark."""
    across = along = {"car": 1.15, "tree": 0.5, "person": 0.32}.get(prop.kind, 0.2)
    if prop.kind == "car":
        across, along = (across, 2.3) if math.cos(prop.heading) ** 2 > 0.5 else (2.3, along)
    return tuple((prop.x + across * math.cos(a), 0.0, max(NEAR, prop.z + along * math.sin(a))) for a in TURN)


def _standing(prop: Prop, half: float, low: float = 0.0) -> list[Outline]:
    """A board that faces the camera, from `low` metres to the prop's size."""
    x, y, z = prop.x, prop.size, prop.z
    return [((x - half, low, z), (x + half, low, z), (x + half, y, z), (x - half, y, z))]


def _crown_outline(prop: Prop) -> list[Outline]:
    x, y, z, r = prop.x, prop.size * 0.66, prop.z, prop.size * 0.28
    crown = tuple((x + r * math.cos(a), y + r * math.sin(a), z + 0.4 * r * math.cos(a)) for a in TURN)
    return [crown, *_standing(prop._replace(size=y), 0.15)]


def _car_outline(prop: Prop) -> list[Outline]:
    """A box: its four walls and its roof."""
    wide, long, high = (0.85, 2.0, 1.3) if math.cos(prop.heading) ** 2 > 0.5 else (2.0, 0.85, 1.3)
    x, z = prop.x, prop.z
    corners = ((x - wide, z - long), (x + wide, z - long), (x + wide, z + long), (x - wide, z + long))
    pairs = itertools.pairwise((*corners, corners[0]))
    walls = (((xa, 0.0, za), (xb, 0.0, zb), (xb, high, zb), (xa, high, za)) for (xa, za), (xb, zb) in pairs)
    return [*walls, tuple((u, high, v) for u, v in corners)]


_SILHOUETTES: dict[str, Callable[[Prop], list[Outline]]] = {
    "tree": _crown_outline,
    "lamp": lambda prop: _standing(prop, 0.1),
    "sign": lambda prop: _standing(prop, 0.06) + _standing(prop, 0.45, prop.size - 0.4),
    "car": _car_outline,
    "person": lambda prop: _standing(prop, 0.16),
}
