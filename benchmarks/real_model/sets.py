"""The sets of pictures of the evidence: cut-out photographs in several settings, and regions of photographs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.real_model.rows import SIZE
from laconic.data.cutouts import Cutouts, CutoutSources, Regions, find_sources

PACKAGES: Path | None = None  # folder in which the packages are unpacked; None: where the library looks by default


@dataclass(frozen=True)
class PictureSet:
    """A set of pictures for retrieval: one view of every instance is the gallery, the other ``queries`` views are queries."""

    name: str
    words: str
    kind: str  # "cutouts" or "regions"
    queries: int
    settings: tuple[tuple[str, Any], ...] = ()
    size: int = SIZE  # pixels a side for the unreduced model

    @property
    def views(self) -> int:
        """Number of views of every instance."""
        return 1 + self.queries


SETS = {
    s.name: s
    for s in (
        PictureSet("large", "things of 50-85 % of the side", "cutouts", 2, (("size", (0.5, 0.85)),)),
        PictureSet("large-many", "things of 50-85 % of the side", "cutouts", 12, (("size", (0.5, 0.85)),)),
        PictureSet("medium", "things of 25-60 % of the side", "cutouts", 2, (("size", (0.25, 0.6)),)),
        PictureSet("small", "things of 1-5 % of the area", "cutouts", 2, (("area", (0.01, 0.05)),)),
        PictureSet("three-things", "25-60 %, three things", "cutouts", 2, (("size", (0.25, 0.6)), ("things", 3))),
        PictureSet("five-grounds", "50-85 %, five backgrounds", "cutouts", 2, (("size", (0.5, 0.85)), ("backgrounds", 5))),
        PictureSet("regions", "regions of photographs, nothing pasted", "regions", 4),
        PictureSet("views", "one view of every region", "regions", 0, (("per_photograph", 3),)),
        PictureSet("views-518", "one region of every photograph", "regions", 0, (("per_photograph", 1), ("pixels", 518)), 518),
    )
}


@lru_cache(maxsize=1)
def sources() -> CutoutSources:
    """Return the things and backgrounds."""
    return find_sources(PACKAGES)


def open_set(name: str) -> Any:
    """Return the pictures of a set, in order of views: picture ``i`` shows instance ``i % n`` in view ``i // n``."""
    one = SETS[name]
    kind: Any = Cutouts if one.kind == "cutouts" else Regions
    return kind(sources(), views=one.views, **dict(one.settings))


def pictures_hash(pictures: Any) -> str:
    """Return a hash of the first pictures of a set, to find out that results belong to other pictures."""
    found = hashlib.sha256(str(len(pictures)).encode())
    for i in range(3):
        found.update(pictures.cutout(i).picture.tobytes())
    return found.hexdigest()[:12]
