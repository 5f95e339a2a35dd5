"""The brush: camera, light, and strokes that paint the picture and its label map together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

Label = IntEnum("Label", "SKY BUILDING ROAD PAVEMENT TREE POLE SIGN CAR PERSON", start=0)

SUPERSAMPLE = 2  # canvas pixels per final pixel, along each side
NEAR, FAR = 1.2, 110.0  # metres ahead of the camera between which the street is built
TURN = tuple(2 * math.pi * i / 16 for i in range(16))
WALLS = (
    (168, 84, 66), (140, 70, 58), (214, 196, 164), (226, 214, 190), (150, 150, 152), (112, 116, 122), (196, 160, 110),
    (176, 190, 188), (206, 158, 140), (128, 140, 156), (236, 232, 222), (98, 84, 76), (188, 176, 120),
)  # fmt: skip
BRIGHT = ((186, 46, 44), (36, 94, 150), (40, 120, 80), (226, 170, 50), (120, 60, 110), (230, 230, 225), (50, 54, 60))

Colour = Sequence[float] | np.ndarray
Point = tuple[float, float]
Point3 = tuple[float, float, float]


class Weather(NamedTuple):
    """Colours (RGB, 0-255) of the sky's top, the horizon and the clouds, and what the hour does to everything else.

    `tint` multiplies the picture; `ambient` and `sun` are the light on a surface turned away from and towards the sun;
    `cloudiness` is a range of 0-1; `haze` is the distance in metres that fades colours to 1/e; `lamps` are on or off.
    """

    top: Colour
    low: Colour
    cloud: Colour
    tint: Colour
    ambient: float
    sun: float
    cloudiness: tuple[float, float]
    haze: float
    lamps: bool


WEATHERS = (
    Weather((72, 132, 205), (196, 222, 240), (250, 250, 250), (1.0, 1.0, 0.98), 0.68, 0.45, (0.0, 0.5), 260, False),
    Weather((96, 156, 200), (240, 226, 204), (255, 246, 232), (1.05, 1.0, 0.9), 0.66, 0.48, (0.1, 0.6), 200, False),
    Weather((92, 108, 160), (252, 190, 130), (255, 214, 178), (1.1, 0.98, 0.84), 0.62, 0.5, (0.2, 0.7), 130, False),
    Weather((158, 166, 176), (214, 216, 218), (186, 190, 196), (0.97, 1.0, 1.02), 0.86, 0.08, (0.5, 1.0), 150, False),
    Weather((190, 198, 204), (222, 224, 222), (214, 218, 220), (0.98, 1.0, 1.0), 0.9, 0.06, (0.2, 0.8), 55, False),
    Weather((44, 50, 96), (196, 132, 136), (120, 96, 130), (0.88, 0.88, 1.04), 0.66, 0.12, (0.2, 0.8), 120, True),
)


class Light(NamedTuple):
    """The weather and the unit vector towards the sun."""

    weather: Weather
    sun: Point3

    def factor(self, normal: Point3) -> float:
        """Brightness of a surface facing `normal`."""
        cosine = sum(s * n for s, n in zip(self.sun, normal, strict=True))
        return self.weather.ambient + self.weather.sun * max(0.0, cosine)


class Camera(NamedTuple):
    """Focal length in canvas pixels, place in metres (z is 0), and the canvas row and column all parallels run to."""

    focal: float
    x: float
    height: float
    horizon: float
    vanish: float

    def project(self, points: Sequence[Point3]) -> list[Point]:
        """World points in metres -> canvas points in pixels; what is behind the camera is clamped to just before it."""
        result = []
        for x, y, z in points:
            scale = self.focal / max(z, 0.4)
            result.append((self.vanish + scale * (x - self.x), self.horizon - scale * (y - self.height)))
        return result


class Street(NamedTuple):
    """Metres: half width of the road, outer edge of the pavement, and where a crossing road begins and ends in z."""

    road: float
    kerb: float
    crossing: tuple[float, float]


@dataclass
class Painter:
    """The picture and label map under the brush, and what every brush stroke needs to know."""

    image: Image.Image
    labels: Image.Image
    camera: Camera
    light: Light
    street: Street
    noise: np.ndarray
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self._image_draw = ImageDraw.Draw(self.image)
        self._label_draw = ImageDraw.Draw(self.labels)

    def shade(self, colour: Colour, z: float, factor: float = 1.0) -> tuple[int, ...]:
        """`colour` under the light, faded into the haze at distance `z` metres."""
        haze = 1.0 - math.exp(-z / self.light.weather.haze)
        mixed = (c * factor * (1 - haze) + low * haze for c, low in zip(colour, self.light.weather.low, strict=True))
        return tuple(int(min(255.0, max(0.0, m))) for m in mixed)

    def polygon(self, points: Sequence[Point], colour: tuple[int, ...], label: int) -> None:
        """Fill a polygon of canvas points."""
        self._image_draw.polygon(points, fill=colour)
        self._label_draw.polygon(points, fill=label)

    def face(self, points: Sequence[Point3], colour: Colour, label: int, factor: float = 1.0) -> None:
        """Fill a polygon of world points."""
        z = sum(p[2] for p in points) / len(points)
        self.polygon(self.camera.project(points), self.shade(colour, z, factor), label)

    def paste(self, texture: np.ndarray, mask: Image.Image, corner: tuple[int, int], label: int) -> None:
        """Put a texture, uint8 (h, w, 3), where `mask` is set; `corner` is its (left, top)."""
        self.image.paste(Image.fromarray(texture), corner, mask)
        self.labels.paste(label, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)

    def clip(self, points: Sequence[Point]) -> tuple[int, int, int, int]:
        """The box (left, top, right, bottom) around canvas points, cut to the canvas; empty boxes have no area."""
        xs, ys = zip(*points, strict=True)
        left, top = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
        return left, top, min(self.image.width, math.ceil(max(xs)) + 1), min(self.image.height, math.ceil(max(ys)) + 1)


class Prop(NamedTuple):
    """One thing on the street: a name in `DRAWERS`, its place in metres, size, heading in radians, own seed."""

    kind: str
    x: float
    z: float
    size: float
    heading: float
    seed: int


def fractal_noise(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Smooth noise of five octaves, float32 (size, size), about -1..1; it tiles without seams."""
    total = np.zeros((size, size), np.float32)
    for octave in range(5):
        cells = 4 * 2**octave
        grid = Image.fromarray(np.pad(rng.uniform(-1, 1, (cells, cells)).astype(np.float32), 3, mode="wrap"))
        inside = (3, 3, cells + 3, cells + 3)
        total += np.float32(0.6**octave) * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=inside))
    return total / np.float32(1.4)


def wrap(noise: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The noise tile, repeated for ever, at fractional rows and columns (rounded towards 0) that broadcast together."""
    height, width = noise.shape
    return noise[rows.astype(np.int32) % height, columns.astype(np.int32) % width]


def wall_colour(rng: np.random.Generator) -> np.ndarray:
    """A wall's colour, RGB 0-255, around one of `WALLS`."""
    return np.asarray(WALLS[rng.integers(len(WALLS))]) + rng.uniform(-14, 14, 3)
