"""A benchmark of photographs: cut-out things on photographed backgrounds, and regions of photographs; any number, seeded.

A picture of `Cutouts` shows one of 191 photographed things, pasted with its alpha channel on a photographed background:
its instance (the thing), its category and its mask are known. A picture of `Regions` is a crop of an untouched photograph
around a region, whose surroundings change with the crop.

The photographs are those of `laconic.data.cutout_sources`.

All random numbers are bits of a generator whose stream numpy guarantees; pixels also depend on Pillow's resampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from laconic.data.cutout_sources import SOLID, CutoutSources, find_sources, permutation, read_background, read_thing
from laconic.data.pictures import ImageSet
from laconic.data.scenes import Draws

__all__ = ["Cutout", "CutoutSources", "Cutouts", "Regions", "find_sources"]

LARGEST = 0.95  # of the side that a thing may take
TRIES = 400  # places tried for the regions of a photograph
LEAST_DETAIL = 4.0  # grey levels between a pixel and its two neighbours, mean of a region

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cutout:
    """A picture [H, W, 3] with the mask [H, W] of its object, the numbers of instance, category and background."""

    picture: Pixels
    mask: Mask
    thing: int
    category: int
    background: int

    @property
    def share(self) -> float:
        """The share of the picture that the object covers."""
        return float(self.mask.mean())


# ------------------------------------------------------------------------------------------------ pictures
class _Seeded(ImageSet):
    """Pictures that are made from files and random numbers, in order of views: ``i`` shows instance ``i % n``."""

    instances: int
    views: int

    def cutout(self, i: int) -> Cutout:
        """Return picture ``i`` with its mask and labels."""
        raise NotImplementedError

    def category(self, i: int) -> int:
        """Return the category of picture ``i``, without making it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.instances * self.views

    def load(self, i: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.cutout(i).picture)

    def _checked(self, i: int) -> tuple[int, int]:
        """Return the instance and the view of picture ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(f"there is no picture {i}: this set has {len(self)}")
        return i % self.instances, i // self.instances


class Cutouts(_Seeded):
    """Photographed things on photographed backgrounds.

    Args:
        sources: files (`find_sources`).
        views: pictures of every thing.
        size: longer side of the thing, as shares of the picture's side: the least and the largest.
        area: share of the picture that the thing covers, instead of ``size``; long things that do not fit cover less.
        things: number of things in a picture. The others are of the same size, chosen at random, and behind the labelled thing.
        backgrounds: number of backgrounds used, of a random order (default: all).
        pixels: side of the pictures.
        seed: seed of all random numbers.
        label: what `label` returns: the number of the category or of the thing.
        first_view: number of the first view; other views have other random numbers.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        sources: CutoutSources,
        *,
        views: int = 3,
        size: tuple[float, float] = (0.5, 0.85),
        area: tuple[float, float] | None = None,
        things: int = 1,
        backgrounds: int | None = None,
        pixels: int = 448,
        seed: int = 0,
        label: Literal["category", "thing"] = "category",
        first_view: int = 0,
    ) -> None:
        for name, (low, high) in (("size", size), *((("area", area),) if area else ())):
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be two shares from 0 to 1, the smaller first, not {low:g} and {high:g}")
        for name, count in (("views", views), ("things", things), ("pixels", pixels)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        known = len(sources.backgrounds)
        if backgrounds is not None and not 1 <= backgrounds <= known:
            raise ValueError(f"backgrounds must be from 1 to {known}, the number that was found, not {backgrounds}")
        self.sources, self.instances, self.views = sources, len(sources.things), views
        self.size, self.area, self.things, self.pixels, self.seed = size, area, things, pixels, seed
        self.by_thing, self.first_view = label == "thing", first_view
        self.grounds = permutation(known, seed)[: backgrounds or known]
        self.categories = sources.categories
        names = [f"{category}/{name}" for name, category, _ in sources.things]
        self.classes = tuple(names) if self.by_thing else self.categories

    def category(self, i: int) -> int:
        return self.categories.index(self.sources.things[i % self.instances][1])

    def label(self, i: int) -> int:
        return i % self.instances if self.by_thing else self.category(i)

    def name(self, i: int) -> str:
        thing, view = self._checked(i)
        return f"{self.sources.things[thing][0]}, view {self.first_view + view}"

    def cutout(self, i: int) -> Cutout:
        thing, view = self._checked(i)
        draws = Draws(self.seed, 0, thing, self.first_view + view)
        ground = self.grounds[draws.integer(len(self.grounds))]
        canvas = self._ground(draws, self.sources.backgrounds[ground])
        for _ in range(self.things - 1):
            other = (thing + 1 + draws.integer(self.instances - 1)) % self.instances
            self._paste(canvas, draws, other)
        mask = self._paste(canvas, draws, thing)
        return Cutout(np.array(canvas), mask, thing, self.category(thing), ground)

    def _ground(self, draws: Draws, file: Path) -> Any:
        """Return a square crop of a background."""
        from PIL import Image, ImageOps

        image = read_background(file, 3 * self.pixels // 2)
        side = max(1, int(min(image.size) * draws.uniform(0.5, 1)))
        left, top = draws.integer(image.width - side + 1), draws.integer(image.height - side + 1)
        shape = (self.pixels, self.pixels)
        crop = image.resize(shape, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return ImageOps.mirror(crop) if draws.uniform(0, 1) < 0.5 else crop

    def _paste(self, canvas: Any, draws: Draws, thing: int) -> Mask:
        """Paste a thing at a random place; return its mask."""
        from PIL import Image, ImageOps

        image = read_thing(self.sources.things[thing][2], self.pixels)
        width, height = self._shape(image, draws)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if draws.uniform(0, 1) < 0.5:
            image = ImageOps.mirror(image)
        left, top = draws.integer(self.pixels - width + 1), draws.integer(self.pixels - height + 1)
        canvas.paste(image, (left, top), image)
        mask = np.zeros((self.pixels, self.pixels), dtype=bool)
        mask[top : top + height, left : left + width] = np.array(image.getchannel("A")) > SOLID
        return mask

    def _shape(self, image: Any, draws: Draws) -> tuple[int, int]:
        """Return the width and height of a thing in pixels."""
        longer = max(image.size)
        if self.area is None:
            scale = self.pixels * draws.uniform(*self.size) / longer
        else:
            covered = (np.array(image.getchannel("A")) > SOLID).sum()
            scale = self.pixels * float(np.sqrt(draws.uniform(*self.area) / covered))
        scale = min(scale, max(LARGEST, self.size[1]) * self.pixels / longer)
        width, height = (min(self.pixels, max(1, round(length * scale))) for length in image.size)
        return width, height


class Regions(_Seeded):
    """Crops of photographs around regions: every view of a region has other surroundings, brightness and contrast.

    The instance is the region, a square of a fourth to two fifths of the photograph's shorter side that has details; its mask
    is the square. The category is the photograph: the regions of a photograph do not overlap.

    Args:
        sources: files (`find_sources`); the backgrounds are the photographs.
        views: pictures of every region.
        per_photograph: number of regions of a photograph, at most.
        pixels: side of the pictures.
        seed: seed of all random numbers.
    """

    def __init__(
        self, sources: CutoutSources, *, views: int = 3, per_photograph: int = 5, pixels: int = 448, seed: int = 0
    ) -> None:
        for name, count in (("views", views), ("per_photograph", per_photograph), ("pixels", pixels)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, not {count}")
        self.files, self.views, self.pixels, self.seed = sources.backgrounds, views, pixels, seed
        chosen = [(n, box) for n, file in enumerate(self.files) for box in _regions(file, seed, n, pixels, per_photograph)]
        self.regions: Sequence[tuple[int, tuple[int, int, int]]] = chosen
        self.instances = len(chosen)
        self.classes = tuple(f"{self.files[n].stem} {left},{top}" for n, (left, top, _) in chosen)

    def category(self, i: int) -> int:
        return self.regions[i % self.instances][0]

    def label(self, i: int) -> int:
        return i % self.instances

    def name(self, i: int) -> str:
        region, view = self._checked(i)
        return f"{self.classes[region]}, view {view}"

    def cutout(self, i: int) -> Cutout:
        from PIL import Image, ImageEnhance, ImageOps

        number, view = self._checked(i)
        photograph, (left, top, side) = self.regions[number]
        image = read_background(self.files[photograph], 2 * self.pixels)
        draws = Draws(self.seed, 2, number, view)
        around = min(int(side * draws.uniform(1.6, 2.5)), *image.size)
        x, y = (
            max(0, start + side - around) + draws.integer(min(start, length - around) - max(0, start + side - around) + 1)
            for start, length in ((left, image.width), (top, image.height))
        )
        scale = self.pixels / around
        crop = image.resize((self.pixels, self.pixels), Image.Resampling.BICUBIC, box=(x, y, x + around, y + around))
        crop = ImageEnhance.Brightness(crop).enhance(draws.uniform(0.85, 1.15))
        crop = ImageEnhance.Contrast(crop).enhance(draws.uniform(0.85, 1.15))
        mask = np.zeros((self.pixels, self.pixels), dtype=bool)
        rows, columns = (slice(round(a * scale), round((a + side) * scale)) for a in (top - y, left - x))
        mask[rows, columns] = True
        picture = np.array(crop)
        if draws.uniform(0, 1) < 0.5:
            picture, mask = np.array(ImageOps.mirror(crop)), mask[:, ::-1].copy()
        return Cutout(picture, mask, number, photograph, photograph)


@lru_cache(maxsize=256)
def _regions(file: Path, seed: int, number: int, pixels: int, count: int) -> tuple[tuple[int, int, int], ...]:
    """Return squares (left, top, side) that do not overlap, with half of the picture's detail or more and `LEAST_DETAIL`."""
    image = read_background(file, 2 * pixels)
    grey = np.array(image.convert("L"), dtype=np.int64)
    detail = np.abs(np.diff(grey, axis=1))[:-1] + np.abs(np.diff(grey, axis=0))[:, :-1]
    table = np.zeros((detail.shape[0] + 1, detail.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = detail.cumsum(0).cumsum(1)
    least, draws, found = max(LEAST_DETAIL, detail.mean() / 2), Draws(seed, 1, number), list[tuple[int, int, int]]()
    for _ in range(TRIES):
        side = int(min(image.size) * draws.uniform(0.25, 0.4))
        left, top = draws.integer(image.width - side), draws.integer(image.height - side)
        inside = table[top + side, left + side] - table[top, left + side] - table[top + side, left] + table[top, left]
        apart = all(left >= x + s or x >= left + side or top >= y + s or y >= top + side for x, y, s in found)
        if apart and side > 8 and inside >= least * side * side:
            found.append((left, top, side))
        if len(found) == count:
            break
    return tuple(found)
