"""`plan`: find the schedule that meets a budget."""

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
from laconic.planning.fidelity import Fidelity, Judged, difference
from laconic.planning.latency import Table, measure_table
from laconic.planning.result import NEAR, Comparison, Plan, relative_error, remarks
from laconic.planning.search import Found, Search, weights_of
from laconic.planning.space import ScheduleFamily, ScheduleSpace
from laconic.planning.timing import Measured, Measuring, measure

CORRECTIONS = 2
FRONT = (0.9, 0.75, 0.6, 0.45)  # costs of the Pareto front's points, as shares of the unreduced model's cost
Wrap = Callable[[Callable[[Schedule], float]], Callable[[Schedule], float]]  # caches scores on disk (see `laconic plan`)


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
    """Find the schedule of a method that just meets a budget. The model is not changed.

    Multiply-adds are exact: no schedule of this shape with one more token would stay within the budget. Times and speed-ups
    are measured on this machine, with torch's current number of threads: a table is measured, the schedule is predicted from
    it, then timed against the unreduced model (with fused attention) and corrected if it is off by more than 3 %.

    Without images the schedule has the method's usual shape, with one keep rate. With images a search looks for the blocks
    and counts that change the model's outputs least. It uses every other image; the remaining images serve to report the
    result, next to the usual shape at the same cost.

    Args:
        model: a supported vision transformer, in evaluation mode on its device; a reduced model is planned as if unreduced.
        method: a name with ``options``, or a config.
        target: "2.3G" or "230M" multiply-adds of one image; "1.6x" as fast as unreduced, measured at ``batch_size``;
            "1.6x-macs" fewer multiply-adds; "12ms" for one forward of ``batch_size`` images.
        at: blocks to reduce at (default: the method's usual blocks, or those that the search finds).
        batch_size: images per forward in time measurements (default: the batch size of ``example``, or 1).
        rounds: measurements of each model (default: as many as a few seconds allow, 10 to 100).
        example: a batch [B, channels, height, width] of the size that the budget is for (default: the model's own size);
            time is measured with these images.
        images: [N, channels, height, width], preprocessed for the model, to search with.
        labels: [N], for accuracies in the report; the search does not use them.
        steps: number of schedules that the search tries.
        seed: seed of the search.
        options: options of the method, if it is given by name.

    Raises:
        ValueError: the budget cannot be parsed, cannot be reached by the method (the message names the nearest one that
            can), or is not below the cost of the unreduced model; the method keeps a different number of tokens for every
            image; or the method must be trained and ``images`` is given.
        TypeError, LookupError: as `laconic.reduce_`.
    """
    at = None if at is None else blocks(at)
    space = ScheduleSpace(model, resolve(method, options), example=example)
    batch_size = batch_size if batch_size is not None else 1 if space.example is None else len(space.example)
    planner = Planner(space, Target.parse(target), at, Measuring(batch_size, rounds))
    return planner.plain() if images is None else planner.searched(images, labels, steps, seed)


class Planner:
    """Planner for one budget, method and model.

    Args:
        space: the method's schedules on the model.
        target: the budget.
        at: blocks to reduce at; None: the usual blocks.
        measuring: settings of time measurements.
        table: block and reducer times, if they were measured before.
    """

    def __init__(
        self, space: ScheduleSpace, target: Target, at: Sequence[int] | None, measuring: Measuring, table: Table | None = None
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
        self.best_base_time = None if self.table is None else self.table.seconds
        if self.limit >= self.base:
            raise ValueError(
                f"budget {target.text}: the unreduced model takes {target.nearest(whole, whole)} already, so there is nothing "
                "to do; ask for less"
            )

    # -------------------------------------------------------------------------------------------- without images
    def plain(self) -> Plan:
        """Plan the method's usual shape with one keep rate."""
        schedule, measured = self.solve(self.usual)
        return self.plan_of(schedule, measured)

    def solve(self, family: ScheduleFamily) -> tuple[Schedule, Measured | None]:
        """Find the schedule of a family that meets the budget; for a budget of time, correct it by measurements.

        Raises:
            ValueError: no schedule does; the message names the nearest budget that one of them meets.
        """
        schedule = self.space.fit(family, self.limit)
        if schedule is None:
            raise ValueError(self.refusal(family))
        if not self.target.measured:
            return schedule, None
        best, limit = (schedule, self.measured(schedule)), self.limit
        for _ in range(CORRECTIONS):
            error = self.error(best[1])
            if error is None or abs(error) <= NEAR:
                break
            limit /= 1 + error
            again = self.space.fit(family, min(limit, 1.0))
            if again is None or again == best[0]:
                break
            new = (again, self.measured(again))
            if abs(self.error(new[1]) or 0) >= abs(error):
                break
            best = new
        return best

    def error(self, measured: Measured) -> float | None:
        """Return the relative error of a measured time, using the fastest baseline time: other load only adds time."""
        base = measured.base_seconds.median
        self.best_base_time = base if self.best_base_time is None else min(self.best_base_time, base)
        return relative_error(self.target, measured, self.best_base_time)

    def measured(self, schedule: Schedule) -> Measured:
        """Time the reduced model against the unreduced one."""
        return measure(self.space, [schedule], self.measuring)[0]

    def refusal(self, family: ScheduleFamily) -> str:
        """Return the error message for a budget that no schedule of a family meets, with the nearest one that can be met."""
        name = self.space.config.info.name
        least = self.space.cost(family(self.space.least(family)))
        whole = self.table.seconds if self.target.kind == "time" and self.table is not None else self.base
        at = list(family(1.0).at)
        if self.target.measured and least >= 1:
            return (
                f"budget {self.target.text}: here, at batch {self.measuring.batch_size}, {name} costs more than it saves: even "
                f"with the fewest tokens that it can keep at blocks {at}, a forward is predicted to take {least:.2f} times as "
                "long as the unreduced model's; use larger batches, a larger model or larger images"
            )
        nearest = self.target.nearest(least / self.base * whole, whole)
        other_blocks = "" if self.at is not None else ", or reduce at other blocks (at)"
        return (
            f"budget {self.target.text}: {name} cannot reach it at blocks {at}, even with the fewest tokens that it can keep "
            f"there; the nearest budget that it can reach is {nearest}. Ask for that{other_blocks}"
        )

    # -------------------------------------------------------------------------------------------- with images
    def searched(self, images: Tensor, labels: Tensor | None, steps: int, seed: int, remember: Wrap | None = None) -> Plan:
        """Search for the shape that changes the outputs least on half of the images; report on the held-out half.

        Raises:
            ValueError: as `plan`.
        """
        config = self.space.config
        if config.info.learns:
            raise ValueError(
                f"{config.info.name} has parameters that must be trained for a schedule, so schedules cannot be compared "
                "before training; plan it without images (--data), then train with the schedule"
            )
        uniform, uniform_time = self.solve(self.usual)
        if uniform.unit != "keep_counts":
            raise ValueError(f"{config.info.name} accepts keep rates only, not counts; plan it without images (--data)")
        halves = [(part, None if labels is None else labels[start::2]) for start in (0, 1) for part in (images[start::2],)]
        searching, held_out = (Fidelity(self.space, part, names) for part, names in halves)

        def score(schedule: Schedule) -> float:
            return torch.tensor(searching(schedule).distance).mean().item()

        wrapped = score if remember is None else remember(score)
        # fit the usual shape to exactly the limit of the search, so that both cost the same
        fitted = self.space.fit(self.usual, self.limit) or uniform
        first = Found(tuple(weights_of(self.space, fitted).items()), fitted, wrapped(fitted))
        search = Search(self.space, self.limit, wrapped, seed, self.at)
        found = search.run([first], steps)
        schedule, measured = uniform, uniform_time
        family = self.usual
        if found[0].schedule != first.schedule:
            family = self.space.weighted(dict(found[0].weights))
            schedule, measured = self.solve(family)
            schedule = self.space.simplify(schedule)
        mine, theirs = held_out(schedule), held_out(uniform)
        judged = (self.judged("searched", schedule, held_out), self.judged("uniform", uniform, held_out))
        front = self.front({"searched": family, "uniform": self.usual}, held_out)
        plan = self.plan_of(schedule, measured)
        notes = list(plan.notes)
        if schedule == uniform:
            notes.append("the search found nothing better than the uniform schedule, so the plan is the uniform schedule")
        compared = Comparison(*difference(mine, theirs))
        plan = dataclasses.replace(plan, judged=judged, comparison=compared, front=front)
        return dataclasses.replace(plan, evaluated=len(search.seen), notes=tuple(notes))

    def judged(self, name: str, schedule: Schedule, fidelity: Fidelity) -> Judged:
        """Return the fidelity and the cost of a schedule."""
        summary = self.space.summary(schedule)
        assert summary is not None
        return fidelity(schedule).judged(name, schedule, summary.macs, None if self.table is None else self.table(summary))

    def front(self, families: dict[str, ScheduleFamily], fidelity: Fidelity) -> tuple[Judged, ...]:
        """Return the fidelity of these shapes at the costs `FRONT`; costs that a shape cannot reach are left out."""
        out = list[Judged]()
        for name, family in families.items():
            fitted = (self.space.fit(family, share * self.base) for share in FRONT)
            out += [self.judged(name, self.space.simplify(schedule), fidelity) for schedule in fitted if schedule is not None]
        return tuple(out)

    def plan_of(self, schedule: Schedule, measured: Measured | None) -> Plan:
        """Build the plan for a schedule."""
        summary = self.space.summary(schedule)
        assert summary is not None
        predicted = None if self.table is None else 1 / self.table(summary)
        facts = (self.space.config.describe(), self.target, schedule, summary.macs, self.unreduced.macs, predicted, measured)
        return Plan(*facts, base_seconds=self.best_base_time, notes=tuple(remarks(measured, self.target, self.best_base_time)))
