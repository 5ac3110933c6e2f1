"""The facts about the model and the schedule that a reducer may use."""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.schedule import Schedule


@dataclass(frozen=True)
class BlockContext:
    """The position of a reducer in the model and in the schedule. In a backbone of several stages all of it is per stage."""

    ordinal: int  # position among the blocks that have a reducer, from 0
    block: int
    dim: int
    heads: int
    keep: float | None  # keep rate of this block; None if the schedule gives counts
    before: int = 0  # patch tokens at the input of the block, for an image of the model's own size
    after: int = 0  # patch tokens at its output
    grid: tuple[int, ...] = (0, 0)  # rows and columns of the patches of such an image; of a clip: tubelets in time first
    depth: int = 0  # number of blocks
    schedule: Schedule | None = None
