"""Distances from the centre of a grid of patches. They depend only on the grid, so they are constants for a compiler."""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of plain values as one that a compiler calls once and does not trace.

    It sets what ``torch.compiler.assume_constant_result`` sets, because that function imports torch._dynamo (one second).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def single(x: float) -> float:
    """Return ``x`` rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def line(length: int, published: bool) -> list[float]:
    """Return coordinates along one side: from the centre, in half patches; or as in the published code."""
    if not published or length == 1:
        return [2.0 * i - (length - 1) for i in range(length)]
    return evenly(float(-length // 2), float(length // 2), length)


def evenly(first: float, last: float, steps: int) -> list[float]:
    """Return ``torch.linspace`` in float32, as plain values."""
    step = single(single(last - first) / (steps - 1))
    return [single(first + step * i if i < steps // 2 else last - step * (steps - 1 - i)) for i in range(steps)]


@constant
def distances(rows: int, columns: int, norm: str, published: bool) -> tuple[float, ...]:
    """Return the distance of every patch from the centre, in raster order."""
    return _distances(rows, columns, norm, published)


@lru_cache
def _distances(rows: int, columns: int, norm: str, published: bool) -> tuple[float, ...]:
    grid = [(abs(y), abs(x)) for y in line(rows, published) for x in line(columns, published)]
    if norm == "linf":
        return tuple(max(pair) for pair in grid)
    if norm == "l1":
        return tuple(single(y + x) for y, x in grid)
    return tuple(single(math.sqrt(single(single(y * y) + single(x * x)))) for y, x in grid)


@constant
def within(patches: int, norm: str, radius: float) -> int:
    """Return the number of patches of a square image within ``radius``, by the published distances."""
    return bisect_right(sorted(distances(*square(patches), norm, True)), radius)


@constant
def ring(patches: int, norm: str, target: int) -> int:
    """Return the number of patches of a square image within the radius whose number is nearest to ``target``."""
    numbers = [within(patches, norm, radius) for radius in sorted(set(distances(*square(patches), norm, True)))]
    return min(numbers, key=lambda number: abs(number - target))


def square(patches: int) -> tuple[int, int]:
    """Return the sides of a square grid.

    Raises:
        ValueError: the number of patches is not a square.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"heuristic: {patches} patches do not form a square, and the grid of the image is not known here; use images of "
            "the size that the model was built for, and count='exact'"
        )
    return side, side
