"""Options of methods that merge tokens in pairs: a block keeps at least half of its tokens, so lower rates need several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from laconic.core.half_limit import HALF, blocks_needed
from laconic.core.method import Method
from laconic.core.schedule import Schedule
from laconic.methods.ops.checks import require


@dataclass(frozen=True)
class Pairing(Method):
    """Options of all methods that merge tokens in pairs.

    Args:
        spread: spread each keep rate below 0.5 over as many consecutive blocks as it needs, which all keep the same share.
            Without it such a rate raises an error.
    """

    spread: bool = dataclasses.field(default=False, kw_only=True)

    removes_at_most_half: ClassVar[bool] = True

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        schedule = super().default_schedule(depth, keep, at)
        return spread_out(self.info.name, schedule, depth) if self.spread else schedule

    def in_every_block(self, ratio: float, depth: int, keep: object, at: Sequence[int] | None) -> Schedule:
        """Return the schedule of the option ``ratio``: every block (or those of ``at``) keeps this share of its tokens.

        Raises:
            ValueError: ``keep`` or ``spread`` is given too, or ``ratio`` is not from 0.5 to 1.
        """
        self.check_alone("ratio", keep)
        wanted = "must be the share of its tokens that a block keeps, from 0.5 to 1"
        require(self.info.name, "ratio", ratio, HALF <= ratio <= 1, wanted)
        return Schedule.rates(ratio, range(depth) if at is None else at)

    def check_alone(self, option: str, keep: object) -> None:
        """Refuse ``keep`` and ``spread`` together with an option that sets how many tokens every block keeps.

        Raises:
            ValueError: one of them is given.
        """
        if keep is not None:
            raise ValueError(f"{self.info.name}: give either {option} (for every block) or keep, not both")
        if self.spread:
            raise ValueError(f"{self.info.name}: spread is for keep rates, but {option} is given; omit one of them")

    def capped(self, schedule: Schedule) -> Schedule:
        """Return keep rates of at least 0.5 that give the token counts version 0.1 gave for smaller rates."""
        return schedule.scaled(lambda keep: max(keep, HALF))


def as_in_0_1(config: Method, schedule: Schedule) -> Schedule:
    """Return the schedule as version 0.1 ran it: it accepted keep rates below 0.5 for these methods, and kept half."""
    if not isinstance(config, Pairing) or schedule.unit != "keep" or min(schedule.values) >= HALF:
        return schedule
    return config.capped(schedule)


def spread_out(owner: str, schedule: Schedule, depth: int) -> Schedule:
    """Replace each keep rate below 0.5 by equal rates of at least 0.5 at consecutive blocks.

    Raises:
        ValueError: there are too few blocks before the next reducing block or the end of the model.
    """
    schedule.check_depth(depth)
    rates = dict[int, float]()
    for block, keep, end in zip(schedule.at, schedule.values, (*schedule.at[1:], depth), strict=True):
        count, free = blocks_needed(keep), end - block
        if count > free:
            raise ValueError(
                f"{owner}: keep={keep:g} at block {block} needs {count} consecutive blocks, each of which keeps at least half, "
                f"and there {'is' if free == 1 else 'are'} {free} before "
                f"{'the end' if end == depth else 'the next reducing block'}; keep {HALF**free:g} or more there, "
                "or reduce at other blocks (at)"
            )
        step = max(HALF, keep ** (1 / count))
        while step**count < keep:  # rounding must not cost a token
            step = math.nextafter(step, 1.0)
        rates |= dict.fromkeys(range(block, block + count), step if count > 1 else keep)
    return Schedule.rates(tuple(rates.values()), tuple(rates))
