"""Options that many methods have."""

from __future__ import annotations

from collections.abc import Sequence

from laconic.core.schedule import Schedule


def remove_schedule(owner: str, r: int | Sequence[int], blocks: Sequence[int]) -> Schedule:
    """The schedule of the option r: tokens to take away in every one of these blocks, one number or one for each.

    Raises:
        ValueError: another number of values than blocks.
    """
    each = (r,) * len(blocks) if isinstance(r, int) else r
    if len(each) != len(blocks):
        raise ValueError(f"{owner}: {len(each)} values of r for {len(blocks)} blocks")
    return Schedule.remove_counts(dict(zip(blocks, each, strict=True)))
