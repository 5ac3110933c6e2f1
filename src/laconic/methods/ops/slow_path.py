"""Where Evo-ViT's placeholders leave and come back, and how many tokens are run meanwhile.

All of it is integers of (schedule, block, depth, patches), asked for at every block of every forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from laconic.core.method import BlockContext, Method
from laconic.core.schedule import Schedule, of_the_initial


@dataclass(frozen=True)
class SlowPath(Method):
    """A method whose tokens sit out a stage of blocks: that from one block of the schedule to the next, or one block.

    Args:
        update: ``parked`` tokens come back as they were; ``fast`` runs one more token, that stands for them.
        stages: choose at the blocks of the schedule (``scheduled``), or anew before every ``block`` from its first one on.
    """

    update: Literal["parked", "fast"] = "parked"
    stages: Literal["scheduled", "block"] = "scheduled"

    def chooses(self, schedule: Schedule | None, block: int) -> bool:
        """Whether tokens are chosen before this block."""
        return schedule is not None and (block >= schedule.at[0] if self.stages == "block" else block in schedule.at)

    def restores(self, schedule: Schedule | None, block: int, depth: int) -> bool:
        """Whether all tokens are there after this block."""
        return schedule is None or self.stages == "block" or block + 1 == depth or block + 1 in schedule.at

    def slow(self, schedule: Schedule | None, block: int, patches: int) -> int:
        """Patch tokens on the slow path at this block: a share of all, since all were back when they were chosen."""
        if schedule is None or block < schedule.at[0]:
            return patches
        value = schedule.values[sum(start <= block for start in schedule.at) - 1]
        if schedule.unit == "keep":
            return max(1, of_the_initial((value,), patches, patches))
        return min(patches, int(value)) if schedule.unit == "keep_counts" else max(1, patches - int(value))

    def running(self, schedule: Schedule | None, block: int, patches: int) -> int:
        """Patch tokens that this block runs: those of the slow path, and the one that stands for the others."""
        slow = self.slow(schedule, block, patches)
        return slow + (self.update == "fast" and slow < patches)

    # ------------------------------------------------------------------------------------------------ as of any method
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
        count = self.running(site.schedule, site.block, site.grid[0] * site.grid[1])
        return count, count
