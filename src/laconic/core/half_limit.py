"""Methods that merge tokens in pairs keep at least half of the tokens of a block: schedules that ask for less are refused."""

from __future__ import annotations

from collections.abc import Sequence

from laconic.core.method import Method
from laconic.core.schedule import Schedule

HALF = 0.5


def check_halves(config: Method, schedule: Schedule, counts: Sequence[int], patches: int, start: int = 0) -> None:
    """Refuse keep rates below 0.5, and counts to leave below half of what arrives, if the method cannot follow them.

    ``counts`` are the tokens that the blocks of the stage keep under this schedule, of ``patches``. The block ``start`` is the
    first of the stage, and block 0 of the schedule. Half of an odd number is rounded up.

    Raises:
        ValueError: the method merges in pairs, and a block is to keep less than half.
    """
    if not config.removes_at_most_half:
        return
    for block, value in zip(schedule.at, schedule.values, strict=True):
        arriving = counts[block - 1] if block else patches
        if schedule.unit == "keep" and value < HALF:
            count = blocks_needed(value)
            raise ValueError(
                f"{config.info.name}: keep={value:g} is asked for at block {start + block}; the smallest rate there is 0.5, "
                f"since it merges tokens in pairs. For {value:g} give {count} blocks (at) and "
                f"keep={value ** (1 / count):.3g} in each{_or_spread(config)}"
            )
        if schedule.unit == "keep_counts" and value < (least := arriving - arriving // 2):
            raise ValueError(
                f"{config.info.name}: block {start + block} is to keep {value} of {arriving} tokens, and the smallest count "
                f"there is {least}, since it merges tokens in pairs; let earlier blocks keep fewer, or reduce at more blocks"
            )


def blocks_needed(keep: float) -> int:
    """Return in how many blocks, each of which keeps at least half, this share is reached."""
    count = 1
    while keep < HALF**count:
        count += 1
    return count


def _or_spread(config: Method) -> str:
    offered = getattr(config, "spread", None) is False
    return ", or keep with spread=True, which takes as many consecutive blocks as a rate needs" if offered else ""
