"""Size limits for image files, checked before a file is read, and before its pixels are decoded or resized."""

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
        super().__init__(name, reason)  # both arguments, so that the error can be pickled between processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_bytes(path: Path, name: str) -> bytes:
    """Return the content of an image file.

    Raises:
        OSError: the file does not exist or cannot be read.
        Unreadable: it is a device or a pipe, or larger than `laconic.core.limits` allows.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise Unreadable(name, "it is not a regular file")
    check_bytes(name, facts.st_size)
    return path.read_bytes()


def check_bytes(name: str, size: int) -> None:
    """Check the size of an image file in bytes.

    Raises:
        Unreadable: the file is larger than the limit.
    """
    _check(name, "its file has", size, limits.PICTURE_BYTES, "bytes")


def check_size(name: str, image: Any) -> None:
    """Check the number of pixels of a PIL image, decoded or not.

    Raises:
        Unreadable: the image has no pixels, or more than the limit.
    """
    width, height = image.size
    if min(width, height) < 1:
        raise Unreadable(name, f"it has no pixels ({width} x {height})")
    _check(name, f"it is {width:,} x {height:,}:", width * height, limits.PIXELS, "pixels")


def check_resize(name: str, image: Any, transform: Any) -> None:
    """Check the number of pixels that a transform would resize a PIL image to.

    A transform that resizes the short side to a given length makes billions of pixels of a 100,000 x 2 image.

    Raises:
        Unreadable: the resized image would have no pixels, or more than the limit.
    """
    if not isinstance(getattr(image, "size", None), tuple):
        return  # not a PIL image: a user's own set may return other types
    width, height = planned_size(image.size, transform)
    claim = f"it is {image.size[0]:,} x {image.size[1]:,}, which the model's transform resizes to {width:,} x {height:,}"
    if min(width, height) < 1:
        raise Unreadable(name, f"{claim}; crop it to a shape nearer to a square")
    _check(name, f"{claim}:", width * height, limits.PIXELS, "pixels")


def planned_size(size: tuple[int, int], transform: Any) -> tuple[int, int]:
    """Return width and height after the first resizing step of a transform (of torchvision or timm)."""
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
    """Return the error for an image that Pillow itself refused at the limit (see `strict`)."""
    found = re.search(r"\d+", str(error))
    try:
        _check(name, "it has", int(found[0]) if found else 0, limits.PIXELS, "pixels")
    except Unreadable as refusal:
        return refusal
    return Unreadable(name, str(error))


@contextmanager
def strict() -> Iterator[None]:
    """Make Pillow refuse truncated images and images above the limit inside the context.

    These settings are global, and other libraries change them. The limit must be Pillow's own because some formats allocate
    all their memory on opening, before their size can be checked.
    """
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    most = int(min(limits.PIXELS * limits.factor(), sys.maxsize))
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, most // 2  # Pillow raises at twice this number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as damaged EXIF data, which does not affect the pixels
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before
