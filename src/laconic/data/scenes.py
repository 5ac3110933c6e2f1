"""A generated benchmark: patterned objects in cluttered scenes, in any number, the same on every machine.

An image shows one large object of 24 classes (4 shapes x 3 patterns x 2 ranges of hue) in front of a textured background,
among smaller objects of random classes. Size, position, rotation, colours, light, noise and occlusion vary. The background is
one of six kinds: with probability 0.75 the kind assigned to the object's class, otherwise a random one. So the background is
evidence of the class, as BAT and TPS argue it is in photographs. The object's mask is known, to measure how much of the object
and how much of the background a method keeps.

Pixels are computed only from integers of a bit generator whose stream numpy guarantees, with operations that IEEE 754 rounds
exactly (no sine, no exponential), so that images are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHAPES = ("disc", "triangle", "cross", "ring")
PATTERNS = ("plain", "striped", "checked")
HUES = ("warm", "cold")
CLASSES = tuple(f"{hue} {pattern} {shape}" for shape in SHAPES for pattern in PATTERNS for hue in HUES)
KINDS = ("grain", "clouds", "stripes", "tiles", "dots", "rings")
AT_HOME = 0.75  # probability that a scene has the kind assigned to its class; otherwise its kind is random
SPLITS = {"train": 0, "val": 1, "test": 2}

Field = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """An image [H, W, 3] of uint8, the numbers of its class and its kind of scene, and the object's mask, [H, W] of bool."""

    picture: NDArray[np.uint8]
    label: int
    kind: int
    mask: NDArray[np.bool_]


class Draws:
    """Random numbers of one image: the bits of PCG64, whose stream numpy guarantees, and exact arithmetic on them."""

    def __init__(self, *key: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float | int, high: float | int) -> float:
        """Draw a number from [low, high)."""
        return low + (high - low) * float(int(self.bits.random_raw()) >> 11) * 2.0**-53

    def integer(self, below: int) -> int:
        """Draw an integer from 0 to ``below`` - 1."""
        return int(self.uniform(0, below))

    def field(self, *shape: int) -> Field:
        """Draw an array of numbers from [0, 1)."""
        raw = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return (raw.astype(np.float64) * 2.0**-53).reshape(shape)

    def turn(self) -> tuple[float, float]:
        """Draw the cosine and sine of a random angle, as a rational point of the unit circle."""
        t = self.uniform(-1, 1)
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return (c, s) if self.uniform(0, 1) < 0.5 else (-c, s)

    def colour(self, low: float, high: float) -> Field:
        """Draw an RGB colour with channels from [low, high)."""
        return low + (high - low) * self.field(3)


@lru_cache(maxsize=1 << 14)  # 6 kB each
def scene(index: int, *, split: str = "train", seed: int = 0, size: int = 40) -> Scene:
    """Render image ``index`` of a split. ``size`` (pixels a side) changes the resolution and the noise, not the scene.

    The arrays are read-only, because they are cached and returned again for the same arguments.

    Raises:
        ValueError: the split is unknown, or a number is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    draws = Draws(seed, SPLITS[split], index)
    label = draws.integer(len(CLASSES))
    kind = home(label) if draws.uniform(0, 1) < AT_HOME else draws.integer(len(KINDS))
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    picture = _background(draws, kind, x, y)
    for _ in range(2 + draws.integer(4)):
        other = draws.integer(len(CLASSES))
        picture, _ = _place(draws, picture, other, x, y, (0.05, 0.1), (0.05, 0.95))
    picture, mask = _place(draws, picture, label, x, y, (0.24, 0.36), (0.3, 0.7))
    if draws.uniform(0, 1) < 0.35:
        picture, mask = _occlude(draws, picture, mask, x, y)
    slope = draws.uniform(-0.35, 0.35), draws.uniform(-0.35, 0.35)
    light = draws.uniform(0.7, 1.15) + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    noise = (draws.field(size, size, 3) + draws.field(size, size, 3) - 1) * draws.uniform(0.02, 0.16)
    shown, covered = (np.clip(picture * light[..., None] + noise, 0, 1) * 255 + 0.5).astype(np.uint8), mask > 0.5
    shown.setflags(write=False)
    covered.setflags(write=False)
    return Scene(shown, label, kind, covered)


def home(label: int) -> int:
    """Return the kind of scene assigned to a class; it differs between the pattern and hue combinations of a shape."""
    shape, pattern, hue = parts(label)
    return (shape + pattern * len(HUES) + hue) % len(KINDS)


def parts(label: int) -> tuple[int, int, int]:
    """Return the numbers of the shape, the pattern and the hue of a class."""
    rest, hue = divmod(label, len(HUES))
    return *divmod(rest, len(PATTERNS)), hue


# ------------------------------------------------------------------------------------------------ shapes and patterns
def _triangle(u: Field, v: Field) -> Field:
    return np.minimum(0.5 - v, np.minimum(0.5 + 0.5 * v + 0.8660254 * u, 0.5 + 0.5 * v - 0.8660254 * u))


def _radius(u: Field, v: Field) -> Field:
    return np.sqrt(u * u + v * v)


TINTS = ((1.0, 0.2, -0.6), (-0.6, 0.2, 1.0))  # shifts of red, green and blue for warm and cold

# Signed distance inside a shape (positive: inside), for shapes in the unit circle.
INSIDE: dict[str, Callable[[Field, Field], Field]] = {
    "disc": lambda u, v: 0.9 - _radius(u, v),
    "triangle": _triangle,
    "cross": lambda u, v: np.maximum(
        np.minimum(0.33 - np.abs(u), 0.95 - np.abs(v)), np.minimum(0.33 - np.abs(v), 0.95 - np.abs(u))
    ),
    "ring": lambda u, v: 0.27 - np.abs(_radius(u, v) - 0.7),
}


def _wave(t: Field) -> Field:
    """Return a smooth wave of period 1 between 0 and 1, from a cubic (smoothstep)."""
    s = np.abs(t - np.floor(t) - 0.5) * 2
    return s * s * (3 - 2 * s)


def _step(t: Field) -> Field:
    """Return a wave of period 1 with steep edges."""
    return np.clip((_wave(t) - 0.5) * 4 + 0.5, 0, 1)


def _pattern(name: str, u: Field, v: Field) -> Field:
    if name == "plain":
        return np.ones_like(u)
    if name == "striped":
        return _step(u * 1.6)
    a, b = _step(u * 1.25), _step(v * 1.25)
    return a * b + (1 - a) * (1 - b)


def _place(
    draws: Draws, picture: Field, label: int, x: Field, y: Field, sizes: tuple[float, float], room: tuple[float, float]
) -> tuple[Field, Field]:
    """Draw an object of a class over an image; return the new image and the object's mask."""
    (shape, pattern, hue), side = parts(label), len(x)
    radius, (c, s) = draws.uniform(*sizes), draws.turn()
    cx, cy, stretch = draws.uniform(*room), draws.uniform(*room), draws.uniform(0.85, 1.15)
    bright = draws.colour(0.15, 0.75) + draws.uniform(0.25, 0.45) * np.array(TINTS[hue])
    dark = bright * draws.uniform(0.15, 0.6)
    reach = radius * 1.2 + 1 / side  # bounds the shape for every stretch
    rows, columns = (slice(max(0, int((at - reach) * side)), max(0, int((at + reach) * side) + 1)) for at in (cy, cx))
    dx, dy = (x[rows, columns] - cx) / radius, (y[rows, columns] - cy) / radius
    u, v = (c * dx + s * dy) * stretch, (c * dy - s * dx) / stretch
    mask = np.zeros_like(x)
    mask[rows, columns] = np.clip(INSIDE[SHAPES[shape]](u, v) * radius * side + 0.5, 0, 1)
    paint = dark + (bright - dark) * _pattern(PATTERNS[pattern], u, v)[..., None]
    out, under = picture.copy(), picture[rows, columns]
    out[rows, columns] = under + mask[rows, columns, None] * (paint - under)
    return out, mask


def _occlude(draws: Draws, picture: Field, mask: Field, x: Field, y: Field) -> tuple[Field, Field]:
    """Draw a strip of one colour across the image; return the new image and the visible part of the mask."""
    (c, s), width = draws.turn(), draws.uniform(0.02, 0.05)
    px, py = draws.uniform(0.25, 0.75), draws.uniform(0.25, 0.75)
    strip = np.clip((width - np.abs(c * (x - px) + s * (y - py))) * len(x) + 0.5, 0, 1)
    return picture + strip[..., None] * (draws.colour(0.1, 0.9) - picture), mask * (1 - strip)


# ------------------------------------------------------------------------------------------------ scenes
def _smooth_noise(draws: Draws, cells: int, x: Field, y: Field) -> Field:
    """Return value noise: random values on a lattice, smoothly interpolated."""
    lattice = draws.field(cells + 2, cells + 2)
    gx, gy = x * cells, y * cells
    i, j = np.floor(gy).astype(np.int64), np.floor(gx).astype(np.int64)
    a, b = gy - i, gx - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    top = lattice[i, j] + b * (lattice[i, j + 1] - lattice[i, j])
    low = lattice[i + 1, j] + b * (lattice[i + 1, j + 1] - lattice[i + 1, j])
    return top + a * (low - top)


def _background(draws: Draws, kind: int, x: Field, y: Field) -> Field:
    """Render a background of a kind: a texture between two colours, plus smooth variations of brightness."""
    c, s = draws.turn()
    rate, px, py = draws.uniform(3.5, 6.5), draws.uniform(-0.5, 1.5), draws.uniform(-0.5, 1.5)
    u, v = (c * x + s * y) * rate, (c * y - s * x) * rate
    texture = {
        "grain": lambda: _smooth_noise(draws, 20, x, y),
        "clouds": lambda: _smooth_noise(draws, 5, x, y),
        "stripes": lambda: _wave(u),
        "tiles": lambda: _step(u) * _step(v) + (1 - _step(u)) * (1 - _step(v)),
        "dots": lambda: np.clip(_wave(u) + _wave(v) - 1, 0, 1) * 2,
        "rings": lambda: _wave(_radius(x - px, y - py) * rate),
    }[KINDS[kind]]()
    grey, colour = draws.uniform(0.15, 0.75), draws.colour(-0.2, 0.2)
    spread = draws.colour(-0.6, 0.6) * draws.uniform(0.5, 1.0)
    return (
        grey + colour + texture[..., None] * spread + (_smooth_noise(draws, 3, x, y)[..., None] - 0.5) * draws.uniform(0, 0.5)
    )
