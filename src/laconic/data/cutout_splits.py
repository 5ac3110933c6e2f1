"""Divide cutouts into train, val and test: other views on other backgrounds in each, and on request other things too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from laconic.data.cutout_sources import CutoutSources, find_sources, permutation
from laconic.data.cutouts import Cutouts
from laconic.data.folder import plain_split
from laconic.data.pictures import Chosen, ImageSet

SPLITS = ("train", "val", "test")
VAL, TEST = 0.15, 0.25  # shares of the backgrounds, and of the things of a category; the rest is for training


@dataclass(frozen=True, kw_only=True)
class CutoutSettings:
    """Options of the pictures, and of their division into splits.

    Args:
        views: pictures of every thing in train, val and test.
        size: longer side of the thing, as shares of the picture's side: the least and the largest.
        area: share of the picture that the thing covers, instead of its size: the least and the largest.
        things: things in a picture; those that are not labelled are behind the labelled one.
        pixels: side of the pictures.
        seed: of all random numbers.
        split_by: view: every thing is in all splits, in other views; thing: the things of every category are divided. The
            backgrounds of the splits are disjoint either way.
    """

    views: tuple[int, int, int] = (10, 2, 4)
    size: tuple[float, float] = (0.5, 0.85)
    area: tuple[float, float] | None = None
    things: int = 1
    pixels: int = 448
    seed: int = 0
    split_by: Literal["view", "thing"] = "view"

    def __post_init__(self) -> None:
        if min(self.views) < 0 or not any(self.views):
            raise ValueError(f"views must be three counts, 0 or more and not all 0, not {self.views}")


def split_cutouts(sources: CutoutSources, settings: CutoutSettings) -> dict[str, Cutouts]:
    """Return the pictures of the splits that have views, labelled with categories.

    The backgrounds of a split, and with ``split_by="thing"`` its things, do not depend on the numbers of views.

    Raises:
        ValueError: there are fewer than three backgrounds, a split has no thing, or a number is out of its range.
    """
    found = len(sources.backgrounds)
    if found < len(SPLITS):
        raise ValueError(f"found {found} backgrounds, expected at least {len(SPLITS)}: the splits have none in common")
    grounds = _dealt(permutation(found, settings.seed))
    things = _divided_things(sources, settings.seed) if settings.split_by == "thing" else dict.fromkeys(SPLITS, sources.things)
    out, first = dict[str, Cutouts](), 0
    for split, views in zip(SPLITS, settings.views, strict=True):
        if views and not things[split]:
            raise ValueError(f"no category has enough things to give one to {split}: expected at least 2, for val at least 3")
        if views:
            backgrounds = tuple(sources.backgrounds[i] for i in sorted(grounds[split]))
            own = replace(sources, things=things[split], backgrounds=backgrounds)
            out[split] = Cutouts(
                own,
                views=views,
                size=settings.size,
                area=settings.area,
                things=settings.things,
                pixels=settings.pixels,
                seed=settings.seed,
                first_view=first,
            )
        first += views
    return out


def open_cutouts(split: str, seed: int = 0) -> ImageSet:
    """Return a split of the cutouts with all other settings at their defaults, in the order of things.

    Raises:
        ValueError: the split is unknown.
        FileNotFoundError: the photographs are not on this machine.
    """
    plain = plain_split(split)
    if plain not in SPLITS:
        raise ValueError(f"cutouts have the splits {', '.join(SPLITS)}, not {split!r}")
    images = split_cutouts(find_sources(), CutoutSettings(seed=seed))[plain]
    # sorted, so that evenly spaced ones are of all things
    order = sorted(range(len(images)), key=lambda i: (i % images.instances, i))
    return Chosen(images, order, "ordered by thing")


def _dealt(order: list[int]) -> dict[str, list[int]]:
    """Divide numbers among the splits; of two, none is for val, and a single one is for train."""
    count = len(order)
    test = max(1, round(TEST * count)) if count > 1 else 0
    val = max(1, round(VAL * count)) if count > 2 else 0
    return {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}


def _divided_things(sources: CutoutSources, seed: int) -> dict[str, tuple[tuple[str, str, Path], ...]]:
    """Divide the things of every category among the splits; they keep their order."""
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for number, category in enumerate(sources.categories):
        own = [i for i, (_, its, _) in enumerate(sources.things) if its == category]
        for split, places in _dealt(permutation(len(own), seed, number)).items():
            chosen[split] += [own[place] for place in places]
    return {split: tuple(sources.things[i] for i in sorted(numbers)) for split, numbers in chosen.items()}
