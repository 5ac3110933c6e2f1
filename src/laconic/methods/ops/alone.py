"""Methods that decide on the number of tokens of each image themselves, and take no keep rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from laconic.core.adaptive import AdaptiveMethod
from laconic.core.schedule import Schedule


class NoKeepRate(AdaptiveMethod):
    """A method without a keep rate: the schedule has none (the method decides), or it is 1 (the unreduced model)."""

    accepts_keep = False
    tuning_hint: ClassVar[str]  # how to get fewer tokens, as text for the error message

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        schedule = super().default_schedule(depth, keep, at)
        self._check(schedule)
        return schedule

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        self._check(schedule)
        return super().counts(schedule, depth, patches)

    def _check(self, schedule: Schedule) -> None:
        if schedule.unit not in ("adaptive", "keep") or any(value != 1 for value in schedule.values):
            raise ValueError(
                f"{self.info.name} decides for every image how many tokens it keeps, and takes no keep rate and no counts; got "
                f"{schedule.unit}={list(schedule.values)}. Omit keep (keep=1 is the unreduced model); {self.tuning_hint}"
            )
