"""The blocks where Evo-ViT's placeholders are parked and restored, and the number of tokens that run in each block.

All results are integers computed from (schedule, block, depth, patches), at every block of every forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from laconic.core.method import BlockContext, Method
from laconic.core.schedule import Schedule, of_the_initial


@dataclass(frozen=True)
class SlowPath(Method):
    """A method whose tokens can skip a stage: the blocks from one block of the schedule to the next, or a single block.

    Args:
        update: ``parked`` tokens come back unchanged; ``fast`` runs one more token that represents them.
        stages: choose at the blocks of the schedule (``scheduled``), or before every ``block`` from the first of them on.
    """

    update: Literal["parked", "fast"] = "parked"
    stages: Literal["scheduled", "block"] = "scheduled"

    def chooses(self, schedule: Schedule | None, block: int) -> bool:
        """Return True if tokens are chosen before this block."""
        return schedule is not None and (block >= schedule.at[0] if self.stages == "block" else block in schedule.at)

    def restores(self, schedule: Schedule | None, block: int, depth: int) -> bool:
        """Return True if all tokens are in the sequence after this block."""
        return schedule is None or self.stages == "block" or block + 1 == depth or block + 1 in schedule.at

    def slow(self, schedule: Schedule | None, block: int, patches: int) -> int:
        """Return the patch tokens on the slow path at this block: a share of all, since all are restored before each choice."""
        if schedule is None or block < schedule.at[0]:
            return patches
        value = schedule.values[sum(start <= block for start in schedule.at) - 1]
        if schedule.unit == "keep":
            return max(1, of_the_initial((value,), patches, patches))
        return min(patches, int(value)) if schedule.unit == "keep_counts" else max(1, patches - int(value))

    def running(self, schedule: Schedule | None, block: int, patches: int) -> int:
        """Return the patch tokens that this block runs: those of the slow path, and the one that represents the others."""
        slow = self.slow(schedule, block, patches)
        return slow + (self.update == "fast" and slow < patches)

    # ------------------------------------------------------------------------------------------------ overrides of `Method`
    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        return range(max(0, schedule.at[0] - 1), depth)

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        out: list[int] = []
        running = patches
        for block in range(depth):
            running = self.running(schedule, block, patches) if block in schedule.at else running
            out.append(patches if self.restores(schedule, block, depth) else running)
        return tuple(out)

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        count = self.running(site.schedule, site.block, math.prod(site.grid))
        return count, count
