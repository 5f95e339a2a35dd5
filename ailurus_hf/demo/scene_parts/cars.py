"""Cars, extruded from a side profile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from ailurus_hf.demo.scene_parts.painter import (
    CAR,
    TURN,
    Colour,
    Painter,
    Point,
    Point3,
    Prop,
)

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
    painter.face(face, (64, 80, 96) if glass else paint, CAR, painter.light.factor(normal))
    if abs(a - b) < 0.12 and min(ya, yb) < 0.5:
        _draw_bumper(painter, place, a + (0.01 if a > 0 else -0.01), half, max(ya, yb))


def _draw_bumper(painter: Painter, place: Place, a: float, half: float, top: float) -> None:
    """Lights, number plate and the dark strip below, at the end `a` of the car (negative: the rear)."""
    lamps = painter.light.weather.lamps
    light = ((250, 245, 220) if a > 0 else (255, 60, 50)) if lamps else ((225, 228, 230) if a > 0 else (176, 30, 34))

    def box(left: float, right: float, low: float, high: float, colour: Colour) -> None:
        corners = (place(a, low, left), place(a, low, right), place(a, high, right), place(a, high, left))
        painter.face(corners, colour, CAR)

    box(-half, half, 0.22, 0.36, (40, 42, 44))
    box(-half, -half + 0.4, top - 0.2, top - 0.02, light)
    box(half - 0.4, half, top - 0.2, top - 0.02, light)
    box(-0.26, 0.26, 0.42, 0.54, (225, 222, 205))


def _draw_flank(
    painter: Painter, place: Place, profile: Sequence[Point], out: float, paint: Colour, normal: Point3
) -> None:
    """One side of the car: body, side windows, two wheels."""
    factor = painter.light.factor(normal)
    painter.face([place(a, y, out) for a, y in profile], paint, CAR, factor)
    cabin = [(a, y) for a, y in profile if y > 0.97]
    middle = sum(a for a, _ in cabin) / len(cabin)
    low = min(y for _, y in cabin)
    window = [place(middle + 0.85 * (a - middle), low + 0.04 + 0.82 * (y - low), out) for a, y in cabin]
    painter.face(window, (58, 70, 84), CAR, 0.4 + 0.6 * factor)
    top = max(y for _, y in cabin)
    post = ((middle - 0.05, low), (middle + 0.05, low), (middle + 0.05, top), (middle - 0.05, top))
    painter.face([place(a, y, out) for a, y in post], paint, CAR, factor)
    for along in (profile[0][0] + 0.75, profile[-1][0] - 0.75):
        for radius, colour in ((0.34, (34, 34, 36)), (0.19, (150, 152, 156))):
            rim = [place(along + radius * math.cos(a), 0.33 + radius * math.sin(a), out * 1.01) for a in TURN]
            painter.face(rim, colour, CAR, factor)
