"""Where a reducer stands: what it may know of the host and of the schedule."""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.schedule import Schedule


@dataclass(frozen=True)
class BlockContext:
    """What a reducer may know when it is built: which stage it is, at which block, and how wide the host is."""

    ordinal: int
    block: int
    dim: int
    heads: int
    keep: float | None  # keep rate here; None where the schedule gives counts
    before: int = 0  # patch tokens that come in and go out here, for an image of the host's own size
    after: int = 0
    grid: tuple[int, int] = (0, 0)  # patches of such an image: rows, columns
    depth: int = 0  # blocks of the host
    schedule: Schedule | None = None
