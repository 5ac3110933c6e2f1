"""The schedules that a method may follow on a model: what each costs, and the one that just meets a budget."""

from __future__ import annotations

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

Price = Callable[[Summary], float]  # what a schedule costs, from its tokens and multiply-adds
Family = Callable[[float], Schedule]  # schedules by a rate in (0, 1]: the greater, the more tokens they leave
FINE = 1e-6  # how finely a keep rate is solved
STEPS = 10  # into which the rates are cut, to see where between two of them the budget is met


def macs_of(summary: Summary) -> float:
    """Multiply-adds of one image."""
    return float(summary.macs)


class Space:
    """All schedules of a method on a model. Nothing of the model is changed: a reduced one is planned as it was before.

    Args:
        model: a supported vision transformer, or a module with one inside.
        config: the method.
        price: what a schedule costs; multiply-adds of one image by default.
        example: a batch of the images that costs are for; None: images of the model's own size.

    Raises:
        ValueError: the method decides for every image how many tokens it keeps; no such images. TypeError: no supported model.
    """

    def __init__(self, model: nn.Module, config: Method, price: Price = macs_of, example: Tensor | None = None) -> None:
        refuse_deciding(config)
        self.model = shared_copy(model)
        if find_reduction(self.model) is not None:
            restore_(self.model)
        self.config, self.price = config, price
        self.host, self.entry = find_host(self.model)
        self.example = None if example is None else batch_for(self.host, example)
        self.size = InputSize.of(self.host, self.entry, self.example)
        self.shapes = self.size.shapes
        self.depth = sum(shape.depth for shape in self.shapes)
        self.known: dict[Schedule, Summary | None] = {}

    def priced(self, price: Price) -> Space:
        """The same schedules at another price."""
        other = object.__new__(Space)
        other.__dict__.update(self.__dict__, price=price)
        return other

    # -------------------------------------------------------------------------------------------- what it costs
    def summary(self, schedule: Schedule) -> Summary | None:
        """Tokens and multiply-adds under a schedule; None where the method cannot follow it."""
        if schedule not in self.known:
            try:
                self.known[schedule] = estimate(self.host, self.config, schedule, example=self.size)
            except ValueError:
                self.known[schedule] = None
        return self.known[schedule]

    def cost(self, schedule: Schedule) -> float:
        """The price of a schedule; infinite where the method cannot follow it."""
        found = self.summary(schedule)
        return math.inf if found is None else self.price(found)

    def unreduced(self) -> Summary:
        """The unreduced model."""
        return estimate(self.host, example=self.size)

    def batch(self, count: int) -> Tensor:
        """So many images to measure with: those of the example, or noise of the model's own size, as often as it takes."""
        images = self.entry.example(self.host) if self.example is None else self.example
        return images.repeat(-(-count // len(images)), *[1] * (images.dim() - 1))[:count]

    # -------------------------------------------------------------------------------------------- which there are
    def usual(self, at: Sequence[int] | None = None) -> Family:
        """One keep rate at the method's usual blocks (or at these), in counts wherever counts say the same."""
        probe = planned(self.config, self.entry, self.host, 0.5, at)
        estimate(
            self.host, self.config, probe, example=self.size
        )  # what is wrong with the method here is said now, not found infeasible
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

    def weighted(self, weights: Mapping[int, float]) -> Family:
        """At each block the tokens fall to rate ** weight of what there is; at most by half where the method can no more."""
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
        """The first block of each stage, and the patches that it gets."""
        offsets = itertools.accumulate((shape.depth for shape in self.shapes), initial=0)
        return {offset: shape.patches for offset, shape in zip(offsets, self.shapes, strict=False)}

    def arriving(self, schedule: Schedule) -> tuple[int, ...]:
        """Patch tokens that come into each block of a schedule of counts."""
        counts, starts = Stages(self.config, schedule, self.shapes).counts(), self.starts
        return tuple(starts.get(block) or counts[block - 1] for block in schedule.at)

    # -------------------------------------------------------------------------------------------- which meets a budget
    def least(self, family: Family) -> float:
        """The smallest rate that the method can follow."""
        rates = (FINE, *(step / 100 for step in range(1, 100)))
        found = next((rate for rate in rates if self._follows(family, rate)), None)
        if found is None:
            raise ValueError(f"{self.config.info.name} with these options can follow no schedule at these blocks")
        return found

    def _follows(self, family: Family, rate: float) -> bool:
        try:
            return math.isfinite(self.cost(family(rate)))
        except ValueError:  # a block would keep less than the method can
            return False

    def fit(self, family: Family, limit: float) -> Schedule | None:
        """The schedule of a family that costs as much as it may, and never more; None where all cost more.

        Of counts none can be one larger without costing more than the limit.
        """
        if self.cost(family(1.0)) <= limit:
            return family(1.0)
        # from many tokens to few, since with very few some methods do something else, and cost less all of a sudden
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
        """Give back single tokens, always where they cost most, for as long as the budget lasts."""
        while schedule.unit == "keep_counts":
            grown = [(self.cost(more), number, more) for number, more in enumerate(self.larger(schedule))]
            fits = [entry for entry in grown if entry[0] <= limit]
            if not fits:
                break
            schedule = max(fits, key=lambda entry: entry[:2])[2]
        return schedule

    def larger(self, schedule: Schedule) -> list[Schedule]:
        """All schedules of one token more at one block, where a block can leave one more."""
        values, out = schedule.values, list[Schedule]()
        for number, (value, n) in enumerate(zip(values, self.arriving(schedule), strict=True)):
            if value < n:
                out.append(dataclasses.replace(schedule, values=(*values[:number], int(value) + 1, *values[number + 1 :])))
        return out

    def tidy(self, schedule: Schedule) -> Schedule:
        """The same without the blocks that take nothing away."""
        if schedule.unit != "keep_counts":
            return schedule
        facts = zip(schedule.at, schedule.values, self.arriving(schedule), strict=True)
        kept: dict[int, Any] = {block: value for block, value, n in facts if value < n}
        return Schedule.keep_counts(kept) if kept else schedule


def refuse_deciding(config: Method) -> None:
    """Refuse a method for which no schedule can be planned.

    Raises:
        ValueError: it takes no keep rate, or every image has a number of tokens of its own.
    """
    if config.accepts_keep and config.info.count == "constant":
        return
    others = ", ".join(sorted(name for name, row in METHODS.items() if row.count == "constant" and not row.trained))
    raise ValueError(
        f"{config.info.name} decides for every image how many tokens it keeps, so no schedule fixes what it costs; "
        f"laconic.summary(model, images=...) says what it spends on yours. These can be planned: {others}"
    )
