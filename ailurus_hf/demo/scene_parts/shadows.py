"""How much light reaches the ground: the shadows of houses and props along the sun's direction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFilter

from ailurus_hf.demo.scene_parts.painter import (
    FAR,
    NEAR,
    TURN,
    Painter,
    Point3,
    Prop,
    Street,
)

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
    walls: list[Outline] = []
    for (xa, za), (xb, zb) in itertools.pairwise((*corners, corners[0])):
        walls.append(((xa, 0.0, za), (xb, 0.0, zb), (xb, high, zb), (xa, high, za)))
    return [*walls, tuple((u, high, v) for u, v in corners)]


_SILHOUETTES: dict[str, Callable[[Prop], list[Outline]]] = {
    "tree": _crown_outline,
    "lamp": lambda prop: _standing(prop, 0.1),
    "sign": lambda prop: _standing(prop, 0.06) + _standing(prop, 0.45, prop.size - 0.4),
    "car": _car_outline,
    "person": lambda prop: _standing(prop, 0.16),
}
