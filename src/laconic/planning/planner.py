"""`plan`: a budget turned into a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.arguments import blocks
from laconic.core.method import Method, resolve
from laconic.core.schedule import Schedule
from laconic.planning.budget import Target
from laconic.planning.fidelity import Judge, Judged, difference
from laconic.planning.latency import Table, measure_table
from laconic.planning.result import NEAR, Comparison, Plan, off_target, remarks
from laconic.planning.search import Found, Search, weights_of
from laconic.planning.space import Family, Space
from laconic.planning.timing import Measured, Measuring, measure

CORRECTIONS = 2
FRONT = (0.9, 0.75, 0.6, 0.45)  # costs of the front, as shares of the unreduced model's
Wrap = Callable[[Callable[[Schedule], float]], Callable[[Schedule], float]]  # remembers scores (see `laconic plan`)


def plan(
    model: nn.Module,
    method: str | Method,
    target: str,
    *,
    at: Sequence[int] | None = None,
    batch_size: int | None = None,
    rounds: int | None = None,
    example: Tensor | None = None,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    steps: int = 60,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """The schedule of a method that just meets a budget. The model is not changed.

    Multiply-adds are exact: no schedule of this shape with one token more would stay within the budget. Times and speed-ups
    are of this machine, now, with as many threads as torch has: a table is measured, the schedule predicted from it, then
    run beside the unreduced model (with fused attention) and corrected if it is off by more than 3 %.

    Without images the shape is the method's usual one, with one keep rate. With images a search looks for blocks and counts
    that change the model's answers least: on every other image, and its outcome is reported on the rest, beside the usual
    shape at the same cost.

    Args:
        model: a supported vision transformer, in evaluation mode on its device; a reduced one is planned as it was before.
        method: a name with ``options``, or a config.
        target: "2.3G" or "230M" multiply-adds of one image; "1.6x" as fast as unreduced, measured at ``batch_size``;
            "1.6x-macs" fewer multiply-adds; "12ms" for one forward of ``batch_size`` images.
        at: blocks to reduce at (default: the method's usual ones, or what the search finds).
        batch_size: images in a forward where time is measured (default: as many as ``example`` has, or 1).
        rounds: measurements of each model (default: as many as a few seconds allow, 10 to 100).
        example: a batch [B, channels, height, width] of the size that the budget is for (default: the model's own size);
            time is measured with these images.
        images: [N, channels, height, width] as the model takes them, to search with.
        labels: [N], for accuracies in the report; the search does not look at them.
        steps: schedules that the search tries.
        seed: of the search.
        options: of the method, when it is given by name.

    Raises:
        ValueError: a budget that is none, that the method cannot reach (says the nearest that it can) or that is no less
            than the unreduced model takes; a method that decides for every image, or must be trained, with images.
        TypeError, LookupError: as `laconic.reduce_`.
    """
    at = None if at is None else blocks(at)
    space = Space(model, resolve(method, options), example=example)
    batch_size = batch_size if batch_size is not None else 1 if space.example is None else len(space.example)
    planner = Planner(space, Target.parse(target), at, Measuring(batch_size, rounds))
    return planner.plain() if images is None else planner.searched(images, labels, steps, seed)


class Planner:
    """One budget, one method, one model.

    Args:
        space: the method's schedules on the model.
        target: the budget.
        at: blocks to reduce at; None: the usual ones.
        measuring: how time is measured.
        table: what the parts of a forward take, where that was measured before.
    """

    def __init__(
        self, space: Space, target: Target, at: Sequence[int] | None, measuring: Measuring, table: Table | None = None
    ) -> None:
        self.target, self.at, self.measuring, self.table = target, at, measuring, table
        self.unreduced = space.unreduced()
        self.usual = space.usual(at)
        if target.measured and table is None:
            self.table = measure_table(space, self.usual, measuring)
        self.space = space.priced(self.table) if target.measured and self.table is not None else space
        self.base = 1.0 if target.measured else float(self.unreduced.macs)
        whole = self.table.seconds if target.kind == "time" and self.table is not None else self.base
        self.limit = target.limit(whole) / whole * self.base
        self.calm = None if self.table is None else self.table.seconds
        if self.limit >= self.base:
            raise ValueError(
                f"budget {target.text}: the unreduced model takes {target.nearest(whole, whole)} already, so there is nothing "
                "to do; ask for less"
            )

    # -------------------------------------------------------------------------------------------- without images
    def plain(self) -> Plan:
        """The usual shape at one keep rate."""
        schedule, measured = self.met(self.usual)
        return self.plan_of(schedule, measured)

    def met(self, family: Family) -> tuple[Schedule, Measured | None]:
        """The schedule of a family that meets the budget; of time, by what the real model takes.

        Raises:
            ValueError: none does; says the nearest budget that one of them meets.
        """
        schedule = self.space.fit(family, self.limit)
        if schedule is None:
            raise ValueError(self.refusal(family))
        if not self.target.measured:
            return schedule, None
        best, limit = (schedule, self.measured(schedule)), self.limit
        for _ in range(CORRECTIONS):
            off = self.off(best[1])
            if off is None or abs(off) <= NEAR:
                break
            limit /= 1 + off
            again = self.space.fit(family, min(limit, 1.0))
            if again is None or again == best[0]:
                break
            new = (again, self.measured(again))
            if abs(self.off(new[1]) or 0) >= abs(off):
                break
            best = new
        return best

    def off(self, measured: Measured) -> float | None:
        """How far from the target, going by the least that the unreduced model has taken: others can only slow it down."""
        base = measured.base_seconds.median
        self.calm = base if self.calm is None else min(self.calm, base)
        return off_target(self.target, measured, self.calm)

    def measured(self, schedule: Schedule) -> Measured:
        """The real reduced model beside the unreduced one."""
        return measure(self.space, [schedule], self.measuring)[0]

    def refusal(self, family: Family) -> str:
        """Why no schedule of a family meets the budget, and which budget one of them does."""
        name = self.space.config.info.name
        least = self.space.cost(family(self.space.least(family)))
        whole = self.table.seconds if self.target.kind == "time" and self.table is not None else self.base
        at = list(family(1.0).at)
        if self.target.measured and least >= 1:
            return (
                f"budget {self.target.text}: here, at batch {self.measuring.batch_size}, {name} costs more than it saves: even "
                f"with the fewest tokens that it can leave at blocks {at}, a forward is predicted to take {least:.2f} times as "
                "long as the unreduced model's; take larger batches, a larger model or longer inputs"
            )
        nearest = self.target.nearest(least / self.base * whole, whole)
        earlier = "" if self.at is not None else ", or reduce at other blocks (at)"
        return (
            f"budget {self.target.text}: {name} cannot reach it at blocks {at}, even with the fewest tokens that it can leave "
            f"there; the nearest that it can is {nearest}. Ask for that{earlier}"
        )

    # -------------------------------------------------------------------------------------------- with images
    def searched(self, images: Tensor, labels: Tensor | None, steps: int, seed: int, remember: Wrap | None = None) -> Plan:
        """The shape that changes the answers least on half of the images, judged on the other half.

        Raises:
            ValueError: as `plan`.
        """
        config = self.space.config
        if config.info.learns:
            raise ValueError(
                f"{config.info.name} has parameters of its own that training has to fit to a schedule, so that no schedule can "
                "be judged before; plan it without images (--data), then train with the schedule"
            )
        uniform, uniform_time = self.met(self.usual)
        if uniform.unit != "keep_counts":
            raise ValueError(f"{config.info.name} takes keep rates only, not counts; plan it without images (--data)")
        halves = [(part, None if labels is None else labels[start::2]) for start in (0, 1) for part in (images[start::2],)]
        seeking, holding = (Judge(self.space, part, names) for part, names in halves)

        def score(schedule: Schedule) -> float:
            return torch.tensor(seeking(schedule).distance).mean().item()

        wrapped = score if remember is None else remember(score)
        # the usual shape is fitted to the very limit of the search, so that both cost the same
        fitted = self.space.fit(self.usual, self.limit) or uniform
        first = Found(tuple(weights_of(self.space, fitted).items()), fitted, wrapped(fitted))
        search = Search(self.space, self.limit, wrapped, seed, self.at)
        found = search.run([first], steps)
        schedule, measured = uniform, uniform_time
        family = self.usual
        if found[0].schedule != first.schedule:
            family = self.space.weighted(dict(found[0].weights))
            schedule, measured = self.met(family)
            schedule = self.space.tidy(schedule)
        mine, theirs = holding(schedule), holding(uniform)
        judged = (self.judged("searched", schedule, holding), self.judged("uniform", uniform, holding))
        front = self.front({"searched": family, "uniform": self.usual}, holding)
        plan = self.plan_of(schedule, measured)
        notes = list(plan.notes)
        if schedule == uniform:
            notes.append("the search found nothing better than the uniform schedule, which is what is planned")
        compared = Comparison(*difference(mine, theirs))
        plan = dataclasses.replace(plan, judged=judged, comparison=compared, front=front)
        return dataclasses.replace(plan, evaluated=len(search.seen), notes=tuple(notes))

    def judged(self, name: str, schedule: Schedule, judge: Judge) -> Judged:
        """The fidelity of a schedule, with what it costs."""
        summary = self.space.summary(schedule)
        assert summary is not None
        return judge(schedule).judged(name, schedule, summary.macs, None if self.table is None else self.table(summary))

    def front(self, families: dict[str, Family], judge: Judge) -> tuple[Judged, ...]:
        """Fidelity of these shapes at other costs, those that are reached."""
        out = list[Judged]()
        for name, family in families.items():
            fitted = (self.space.fit(family, share * self.base) for share in FRONT)
            out += [self.judged(name, self.space.tidy(schedule), judge) for schedule in fitted if schedule is not None]
        return tuple(out)

    def plan_of(self, schedule: Schedule, measured: Measured | None) -> Plan:
        """The plan for a schedule."""
        summary = self.space.summary(schedule)
        assert summary is not None
        predicted = None if self.table is None else 1 / self.table(summary)
        facts = (self.space.config.describe(), self.target, schedule, summary.macs, self.unreduced.macs, predicted, measured)
        return Plan(*facts, base_seconds=self.calm, notes=tuple(remarks(measured, self.target, self.calm)))
