"""The schedules that a method can follow on a model: the cost of each, and the one that just meets a budget."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.input_size import InputSize, batch_for
from laconic.analysis.macs import estimate
from laconic.analysis.summary import Summary
from laconic.api import planned, restore_
from laconic.core.backbone import find_host
from laconic.core.method import METHODS, Method
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.token_reduction import find_reduction
from laconic.methods.chain import Chain

Price = Callable[[Summary], float]  # the cost of a schedule, from its tokens and multiply-adds
ScheduleFamily = Callable[[float], Schedule]  # schedules by a rate in (0, 1]: the higher, the more tokens they keep
FINE = 1e-6  # precision to which a keep rate is solved
STEPS = 10  # number of intervals of the rate in which the solution is looked for first


def macs_of(summary: Summary) -> float:
    """Return the multiply-adds of one image."""
    return float(summary.macs)


class ScheduleSpace:
    """All schedules of a method on a model. The model is not changed; a reduced model is planned as if unreduced.

    Args:
        model: a supported vision transformer, or a module with one inside.
        config: the method.
        price: returns the cost of a schedule; by default the multiply-adds of one image.
        example: a batch of images of the size that costs are for; None: images of the model's own size.

    Raises:
        ValueError: the method keeps a different number of tokens for every image, or the model does not accept ``example``.
        TypeError: the model is not supported.
    """

    def __init__(self, model: nn.Module, config: Method, price: Price = macs_of, example: Tensor | None = None) -> None:
        refuse_deciding(config)
        self.model = shared_copy(model)
        if find_reduction(self.model) is not None:
            restore_(self.model)
        self.config, self.price = config, price
        self.host, self.entry = find_host(self.model)
        self.example = None if example is None else batch_for(self.host, self.entry, example)
        self.size = InputSize.of(self.host, self.entry, self.example)
        self.shapes = self.size.shapes
        self.depth = sum(shape.depth for shape in self.shapes)
        self.known: dict[Schedule, Summary | None] = {}
        self._unreduced: Summary | None = None

    def priced(self, price: Price) -> ScheduleSpace:
        """Return the same schedules with another cost function."""
        other = copy.copy(self)
        other.price = price
        return other

    # -------------------------------------------------------------------------------------------- costs
    def applied(self, schedule: Schedule) -> tuple[Method, Schedule]:
        """Return the method and schedule that the model is reduced with."""
        return self.config, schedule

    def summary(self, schedule: Schedule) -> Summary | None:
        """Return tokens and multiply-adds under a schedule; None if the method cannot follow it."""
        if schedule not in self.known:
            try:
                whole = self.unreduced().macs
                self.known[schedule] = estimate(self.host, *self.applied(schedule), example=self.size, baseline=whole)
            except ValueError:
                self.known[schedule] = None
        return self.known[schedule]

    def cost(self, schedule: Schedule) -> float:
        """Return the cost of a schedule; infinite if the method cannot follow it."""
        found = self.summary(schedule)
        return math.inf if found is None else self.price(found)

    def unreduced(self) -> Summary:
        """Return tokens and multiply-adds of the unreduced model."""
        if self._unreduced is None:
            self._unreduced = estimate(self.host, example=self.size)
        return self._unreduced

    def batch(self, count: int) -> Tensor:
        """Return ``count`` images to measure with: the example, or noise of the model's own size, repeated as needed."""
        images = self.entry.example(self.host) if self.example is None else self.example
        return images.repeat(-(-count // len(images)), *[1] * (images.dim() - 1))[:count]

    # -------------------------------------------------------------------------------------------- families of schedules
    def usual(self, at: Sequence[int] | None = None) -> ScheduleFamily:
        """Return the family with one keep rate at the method's usual blocks (or at ``at``).

        Schedules are given as counts if counts have the same effect as keep rates.
        """
        probe = planned(self.config, self.entry, self.host, 0.5, at)
        # raises if the method does not fit the model; later, the same error would count as an infeasible schedule
        estimate(self.host, self.config, probe, example=self.size)
        exact = self._as_counts(probe)
        same = exact is not None and self.summary(exact) == self.summary(probe)

        def family(rate: float) -> Schedule:
            schedule = planned(self.config, self.entry, self.host, rate, at)
            counts = self._as_counts(schedule) if same else None
            return schedule if counts is None else counts

        return family

    def _as_counts(self, schedule: Schedule) -> Schedule | None:
        counts = Stages(self.config, schedule, self.shapes).counts()
        return Schedule.keep_counts({block: counts[block] for block in schedule.at})

    def weighted(self, weights: Mapping[int, float]) -> ScheduleFamily:
        """Return the family in which a block keeps the share rate ** weight of its tokens (rounded down).

        If the method removes at most half of the tokens, a block keeps at least half.
        """
        starts = self.starts

        def family(rate: float) -> Schedule:
            counts, share, whole, n = dict[int, int](), 1.0, 0, 0
            for block in range(self.depth):
                if block in starts:
                    share, whole = 1.0, starts[block]
                    n = whole
                if block in weights:
                    share *= rate ** weights[block]
                    least = n - n // 2 if self.config.removes_at_most_half else 1
                    n = min(n, max(least, int(whole * share + FINE)))
                    counts[block] = n
            return Schedule.keep_counts(counts)

        return family

    @property
    def starts(self) -> dict[int, int]:
        """The first block of each stage -> the patch tokens entering it."""
        offsets = itertools.accumulate((shape.depth for shape in self.shapes), initial=0)
        return {offset: shape.patches for offset, shape in zip(offsets, self.shapes, strict=False)}

    def arriving(self, schedule: Schedule) -> tuple[int, ...]:
        """Return the patch tokens entering each reducing block of a schedule of counts."""
        counts, starts = Stages(self.config, schedule, self.shapes).counts(), self.starts
        return tuple(starts.get(block) or counts[block - 1] for block in schedule.at)

    # -------------------------------------------------------------------------------------------- meeting a budget
    def least(self, family: ScheduleFamily) -> float:
        """Return the smallest rate of a family that the method can follow.

        Raises:
            ValueError: the method can follow none.
        """
        rates = (FINE, *(step / 100 for step in range(1, 100)))
        found = next((rate for rate in rates if self._follows(family, rate)), None)
        if found is None:
            raise ValueError(
                f"{self.config.info.name} with these options can follow no schedule at these blocks; choose other blocks or "
                "options"
            )
        return found

    def _follows(self, family: ScheduleFamily, rate: float) -> bool:
        try:
            return math.isfinite(self.cost(family(rate)))
        except ValueError:  # a block would keep fewer tokens than the method allows
            return False

    def fit(self, family: ScheduleFamily, limit: float) -> Schedule | None:
        """Return the costliest schedule of a family within the limit; None if all cost more.

        If it is given as counts, no count can be one higher without exceeding the limit.
        """
        if self.cost(family(1.0)) <= limit:
            return family(1.0)
        # from many tokens to few: with very few, some methods switch to another computation and their cost drops suddenly
        least, high = self.least(family), 1.0
        for low in [*(step / STEPS for step in range(STEPS - 1, 0, -1) if step / STEPS > least), least]:
            if self.cost(family(low)) <= limit:
                break
            high = low
        else:
            return None
        while high - low > FINE / 4 and family(low) != family(high):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(family(middle)) <= limit else (low, middle)
        return self._filled(family(low), limit)

    def _filled(self, schedule: Schedule, limit: float) -> Schedule:
        """Keep one more token at a time, always at the block where it costs most, as long as the budget allows."""
        while schedule.unit == "keep_counts":
            larger = [(self.cost(more), number, more) for number, more in enumerate(self.larger(schedule))]
            fits = [entry for entry in larger if entry[0] <= limit]
            if not fits:
                break
            schedule = max(fits, key=lambda entry: entry[:2])[2]
        return schedule

    def larger(self, schedule: Schedule) -> list[Schedule]:
        """Return all schedules that keep one more token at one block."""
        values, out = schedule.values, list[Schedule]()
        for number, (value, n) in enumerate(zip(values, self.arriving(schedule), strict=True)):
            if value < n:
                out.append(dataclasses.replace(schedule, values=(*values[:number], int(value) + 1, *values[number + 1 :])))
        return out

    def simplify(self, schedule: Schedule) -> Schedule:
        """Return the schedule without the blocks that keep all their tokens."""
        if schedule.unit != "keep_counts":
            return schedule
        facts = zip(schedule.at, schedule.values, self.arriving(schedule), strict=True)
        kept: dict[int, Any] = {block: value for block, value, n in facts if value < n}
        return Schedule.keep_counts(kept) if kept else schedule


class ChainSpace(ScheduleSpace):
    """The schedules of a method that follows another one, which has reduced the patches before the first block.

    Args:
        model: as `ScheduleSpace`.
        first: the method before the first block.
        keep: its keep rate.
        config: the method that follows.

    Raises:
        ValueError, TypeError: as `ScheduleSpace`, and as `laconic.Chain`.
    """

    def __init__(self, model: nn.Module, first: Method, keep: float, config: Method) -> None:
        super().__init__(model, config)
        self.first, self.keep = first, keep
        self.entering = Stages(first, first.default_schedule(self.depth, keep, None), self.shapes).counts()[0]

    def applied(self, schedule: Schedule) -> tuple[Method, Schedule]:
        chain = Chain((self.first, {"keep": self.keep}), (self.config, {"schedule": schedule}))
        return chain, chain.default_schedule(self.depth, None, None)

    @property
    def starts(self) -> dict[int, int]:
        """The first block -> the tokens entering it."""
        return {0: self.entering}

    def arriving(self, schedule: Schedule) -> tuple[int, ...]:
        return tuple(min(n, self.entering) for n in super().arriving(schedule))


def refuse_deciding(config: Method) -> None:
    """Raise if no schedule can be planned for a method.

    Raises:
        ValueError: the method accepts no keep rate, or keeps a different number of tokens for every image.
    """
    if config.accepts_keep and config.info.count == "constant":
        return
    others = ", ".join(sorted(name for name, row in METHODS.items() if row.count == "constant" and not row.trained))
    raise ValueError(
        f"{config.info.name} decides for every image how many tokens it keeps, so no schedule fixes its cost; "
        f"laconic.summary(model, images=...) measures it on your images. These can be planned: {others}"
    )
