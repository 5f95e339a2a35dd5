"""What stands on the street: where it goes, and how trees, lamps, signs and people are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ailurus_hf.demo.scene_parts.cars import draw_car
from ailurus_hf.demo.scene_parts.painter import (
    BRIGHT,
    FAR,
    PERSON,
    POLE,
    SIGN,
    SUPERSAMPLE,
    TURN,
    WALLS,
    Colour,
    Painter,
    Point,
    Prop,
)
from ailurus_hf.demo.scene_parts.trees import draw_tree


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


def _draw_lamp(painter: Painter, prop: Prop) -> None:
    """A street lamp: post, arm over the road and lantern. `heading` 0 points the arm to +x, pi to -x."""
    rng = np.random.default_rng(prop.seed)
    x, z, top, side = prop.x, prop.z, prop.size, math.cos(prop.heading)
    colour = np.asarray(((70, 74, 78), (120, 122, 120), (48, 70, 62))[rng.integers(3)])
    factor = painter.light.factor((0.3 * side, 0, -0.9))
    _draw_post(painter, x, z, top, 0.11, colour)
    arm = ((x, top - 0.1, z), (x + 1.2 * side, top + 0.12, z), (x + 1.2 * side, top + 0.28, z), (x, top + 0.08, z))
    painter.face(arm, colour, POLE, factor)
    glow = (255, 240, 190) if painter.light.weather.lamps else (200, 200, 190)
    low, high = (x + 0.9 * side, top - 0.02, z), (x + 1.7 * side, top + 0.1, z)
    painter.face((low, high, (x + 1.6 * side, top + 0.32, z), (x + side, top + 0.3, z)), colour, POLE, factor)
    painter.face((low, high, (x + 1.6 * side, top - 0.02, z), (x + side, top - 0.1, z)), glow, POLE)


def _draw_post(painter: Painter, x: float, z: float, top: float, half: float, colour: Colour) -> None:
    """A round post: a lit and a shaded half, at least one final pixel wide."""
    half = max(half, 0.55 * SUPERSAMPLE * z / painter.camera.focal)
    for a, b in ((-half, 0.0), (0.0, half)):
        outline = ((x + a, 0, z), (x + b, 0, z), (x + b * 0.8, top, z), (x + a * 0.8, top, z))
        painter.face(outline, colour, POLE, painter.light.factor((math.copysign(0.8, a + b), 0, -0.6)))


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
        painter.face(outline, colour, SIGN, factor)


def _draw_person(painter: Painter, prop: Prop) -> None:
    """Legs in mid-stride, torso, arms, head and hair, from the proportions of a standing figure."""
    rng = np.random.default_rng(prop.seed)
    tall, z, stride = prop.size, prop.z, rng.uniform(-0.16, 0.16)
    shirt, trousers = (np.asarray((BRIGHT + WALLS)[rng.integers(20)]) * rng.uniform(0.6, 1.1) for _ in range(2))
    skin = np.asarray((236, 196, 164)) * rng.uniform(0.45, 1.0)
    hair = np.asarray(((60, 44, 36), (36, 32, 32), (150, 110, 60), (170, 168, 166))[rng.integers(4)])
    factor = painter.light.factor((0, 0.3, -0.8))

    def part(points: Sequence[Point], colour: Colour, gain: float = 1.0) -> None:
        painter.face([(prop.x + tall * u, tall * v, z) for u, v in points], colour, PERSON, factor * gain)

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


DRAWERS: dict[str, Callable[[Painter, Prop], None]] = {
    "tree": draw_tree, "lamp": _draw_lamp, "sign": _draw_sign, "car": draw_car, "person": _draw_person,
}  # fmt: skip
