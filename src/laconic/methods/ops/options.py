"""Options that several methods have."""

from __future__ import annotations

from collections.abc import Sequence

from laconic.core.schedule import Schedule


def remove_schedule(owner: str, r: int | Sequence[int], blocks: Sequence[int]) -> Schedule:
    """Return the schedule of the option r: the number of tokens to remove in each of ``blocks``, one for all or one each.

    Raises:
        ValueError: the number of values is not the number of blocks.
    """
    each = (r,) * len(blocks) if isinstance(r, int) else r
    if len(each) != len(blocks):
        raise ValueError(f"{owner}: {len(each)} values of r for {len(blocks)} blocks; give one number, or one for each block")
    return Schedule.remove_counts(dict(zip(blocks, each, strict=True)))
