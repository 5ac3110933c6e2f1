"""The sizes of image files: claims are checked before a file is read, and before its pixels are decoded or resized."""

from __future__ import annotations

import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laconic.core import limits


class Unreadable(ValueError):
    """An image that cannot be read: its ``name`` and the ``reason``."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it crosses process borders
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_bytes(path: Path, name: str) -> bytes:
    """Return what is in an image file.

    Raises:
        OSError: there is no such file, or it may not be read.
        Unreadable: it is a device or a pipe, or longer than `laconic.core.limits` allows.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise Unreadable(name, "it is not a regular file")
    check_bytes(name, facts.st_size)
    return path.read_bytes()


def check_bytes(name: str, size: int) -> None:
    """Refuse an image file longer than the limit.

    Raises:
        Unreadable: it is.
    """
    _check(name, "its file has", size, limits.PICTURE_BYTES, "bytes")


def check_size(name: str, image: Any) -> None:
    """Refuse an image of PIL, decoded or not, with more pixels than the limit, or with none.

    Raises:
        Unreadable: it is one of these.
    """
    width, height = image.size
    if min(width, height) < 1:
        raise Unreadable(name, f"it has no pixels ({width} x {height})")
    _check(name, f"it is {width:,} x {height:,}:", width * height, limits.PIXELS, "pixels")


def check_resize(name: str, image: Any, transform: Any) -> None:
    """Refuse an image of PIL that a transform would resize to more pixels than the limit, or to none.

    Where the short side is resized to a given length, a picture of 100,000 x 2 pixels becomes one of billions.

    Raises:
        Unreadable: it is one of these.
    """
    if not isinstance(getattr(image, "size", None), tuple):
        return  # no image of PIL: what a set of one's own gives
    width, height = planned_size(image.size, transform)
    claim = f"it is {image.size[0]:,} x {image.size[1]:,}, which the model's transform resizes to {width:,} x {height:,}"
    if min(width, height) < 1:
        raise Unreadable(name, f"{claim}; crop it to a shape nearer to a square")
    _check(name, f"{claim}:", width * height, limits.PIXELS, "pixels")


def planned_size(size: tuple[int, int], transform: Any) -> tuple[int, int]:
    """Return width and height after the step of a transform (of torchvision or timm) that resizes the image first."""
    for step in _steps(transform):
        kind, wanted = type(step).__name__, getattr(step, "size", None)
        if "Crop" in kind:
            break
        if kind == "ResizeKeepRatio":
            ratios = [own / target for own, target in zip(size, step.size[::-1], strict=True)]
            times = 1 / (step.longest * max(ratios) + (1 - step.longest) * min(ratios))
        elif kind == "Resize" and isinstance(wanted, Sequence) and len(wanted) == 2:
            return wanted[1], wanted[0]
        elif kind == "Resize":
            short = wanted[0] if isinstance(wanted, Sequence) else wanted
            longest = step.max_size or sys.maxsize
            times = min((short or longest) / min(size), longest / max(size))
        else:
            continue
        return round(size[0] * times), round(size[1] * times)
    return size


def _steps(transform: Any) -> Iterator[Any]:
    parts = getattr(transform, "transforms", None)
    if parts is None:
        yield transform
    for part in parts or ():
        yield from _steps(part)


def _check(name: str, claim: str, found: int, limit: int, unit: str) -> None:
    try:
        limits.check(claim, found, limit, unit)
    except limits.TooLarge as error:
        raise Unreadable(name, str(error)) from error


def too_large(name: str, error: Exception) -> Unreadable:
    """Return what to raise where Pillow itself stopped at the limit (see `strict`)."""
    found = re.search(r"\d+", str(error))
    try:
        _check(name, "it has", int(found[0]) if found else 0, limits.PIXELS, "pixels")
    except Unreadable as refusal:
        return refusal
    return Unreadable(name, str(error))


@contextmanager
def strict() -> Iterator[None]:
    """Let Pillow refuse images that are cut off, or larger than the limit; other libraries set this for all.

    Some formats allocate all their memory when they are opened, before their size can be asked for.
    """
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    most = int(min(limits.PIXELS * limits.factor(), sys.maxsize))
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, most // 2  # the error comes at twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data and the like: no damage to the picture
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before
