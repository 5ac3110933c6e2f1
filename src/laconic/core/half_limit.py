"""Check of schedules for methods that merge tokens in pairs, and so keep at least half of a block's tokens."""

from __future__ import annotations

from collections.abc import Sequence

from laconic.core.method import Method
from laconic.core.schedule import Schedule

HALF = 0.5


def check_halves(config: Method, schedule: Schedule, counts: Sequence[int], patches: int, start: int = 0) -> None:
    """Raise if a keep rate is below 0.5, or a count below half of a block's input, and the method cannot go below half.

    ``counts`` are the tokens that each block of the stage keeps under this schedule, starting from ``patches``. The block
    ``start`` is the first of the stage, and block 0 of the schedule. Half of an odd number is rounded up.

    Raises:
        ValueError: the method merges in pairs, and the schedule keeps less than half at a block.
    """
    if not config.removes_at_most_half:
        return
    for block, value in zip(schedule.at, schedule.values, strict=True):
        num_input = counts[block - 1] if block else patches
        if schedule.unit == "keep" and value < HALF:
            count = blocks_needed(value)
            raise ValueError(
                f"{config.info.name}: keep={value:g} at block {start + block} is too low; the smallest rate is 0.5, since this "
                f"method merges tokens in pairs. For {value:g} give {count} blocks (at) and "
                f"keep={value ** (1 / count):.3g} in each{_or_spread(config)}"
            )
        if schedule.unit == "keep_counts" and value < (least := num_input - num_input // 2):
            raise ValueError(
                f"{config.info.name}: block {start + block} is to keep {value} of {num_input} tokens, and the smallest count "
                f"there is {least}, since it merges tokens in pairs; let earlier blocks keep fewer, or reduce at more blocks"
            )


def blocks_needed(keep: float) -> int:
    """Return the number of blocks needed to reach this keep rate if each block keeps at least half."""
    count = 1
    while keep < HALF**count:
        count += 1
    return count


def _or_spread(config: Method) -> str:
    offered = getattr(config, "spread", None) is False
    return ", or keep with spread=True, which takes as many consecutive blocks as a rate needs" if offered else ""
