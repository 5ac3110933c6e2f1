"""The report of ``laconic plan``: the schedule, its cost, and its distance from the unreduced model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.cli.compare import threads
from laconic.cli.output import NONE, Report, Table, Verbatim
from laconic.core.files import Refusal
from laconic.planning.budget import Target
from laconic.planning.fidelity import Judged
from laconic.planning.result import Plan, relative_error
from laconic.planning.timing import Measured

TOLERANCE = 0.1  # for a plan that is measured again
UNITS = {"keep": "keep rate", "keep_counts": "patch tokens to keep", "remove_counts": "patch tokens to remove"}
HEADER = ("", "GMACs", "predicted time", "distance (95 %)", "agrees % (95 %)", "top-1 % (95 %)", "schedule")
EXPLAINED = (
    "distance: mean KL of the class probabilities from the unreduced model's, in nats (without a head: 1 - cosine). agrees: "
    "images with the same first class as the unreduced model's. Wilson's intervals for shares. Predicted time is a share of "
    "the unreduced model's. * : no row of the table is cheaper and nearer."
)


@dataclass(frozen=True)
class PlanReport(Report):
    """A plan, and the model and machine it was made for."""

    plan: Plan
    about: Mapping[str, Any]
    more: tuple[str, ...] = ()

    def parts(self) -> Iterator[str | Table]:
        plan, here = self.plan, self.about["environment"]
        name = f"{self.about['model']}, {plan.method['name']}, {plan.target.text}"
        blocks = zip(plan.schedule.at, plan.schedule.values, strict=True)
        unit = UNITS.get(plan.schedule.unit, plan.schedule.unit)
        yield f"{name}:"
        yield Table("", ("block", unit), tuple((str(block), f"{value:g}") for block, value in blocks))
        yield f"{plan.macs / 1e9:.4f} GMACs of {plan.baseline_macs / 1e9:.4f} ({plan.baseline_macs / plan.macs:.3f}x fewer)."
        if plan.measured is not None:
            yield f"{'' if plan.predicted is None else f'Predicted {plan.predicted:.2f}x. '}{said(plan.measured)}"
        if plan.comparison is not None:
            rows = [*plan.judged, *plan.front]
            yield table(rows, f"Held-out images: {plan.judged[0].images} of {self.about['data']}")
            yield f"{EXPLAINED} {plan.evaluated} schedules were tried on the other images."
            yield f"Verdict: {words(plan)}"
        notes = [note for note in (self.about["weights"], *self.more, *plan.notes) if note]
        if notes:
            yield "".join(f"{note[0].upper()}{note[1:]}.\n" for note in notes).rstrip()
        kind = f"{here['device']}, {threads(here)}, {here['dtype']}, torch {here['torch']}, {here['date']}"
        yield f"{kind}\n\nFor laconic train:"
        yield Verbatim(plan.recipe)

    def to_json(self) -> dict[str, Any]:
        # the plan's own facts last: its target and its method say more than what was asked for
        return {**self.about, **self.plan.to_json(), "recipe": self.plan.recipe, "remarks": list(self.more)}


def said(measured: Measured) -> str:
    """Return the measurement in a line."""
    r, own, base = measured.ratio, measured.seconds.median * 1e3, measured.base_seconds.median * 1e3
    return (
        f"Measured {r.median:.2f}x ({r.low:.2f}-{r.high:.2f}): {own:.2f} ms, and the unreduced model takes {base:.2f} ms, "
        f"batch {measured.batch_size}, {measured.rounds} rounds."
    )


def words(plan: Plan) -> str:
    """Return the comparison with the uniform schedule, with its numbers."""
    found = plan.comparison
    assert found is not None
    shift = f"distance {found.distance.mean:+.4f} ± {found.distance.half:.4f}"
    top1 = "" if found.top1 is None else f", top-1 {100 * found.top1.mean:+.1f} ± {100 * found.top1.half:.1f} points"
    return f"{found.verdict} ({shift}{top1}; 95 % intervals, image by image)."


def table(rows: Sequence[Judged], title: str) -> Table:
    """Return a table of schedules and their fidelity, with a star if no other is better in both cost and distance."""

    def beaten(row: Judged) -> bool:
        def cost(one: Judged) -> float:
            return one.macs if row.share is None or one.share is None else one.share

        return any(cost(o) <= cost(row) and o.distance.mean < row.distance.mean for o in rows if o is not row)

    def cells(row: Judged) -> tuple[str, ...]:
        share = NONE if row.share is None else f"{row.share:.3f}"
        distance = f"{row.distance.mean:.4f} ± {row.distance.half:.4f}"
        top1 = NONE if row.top1 is None or row.top1_interval is None else share_of(row.top1, row.top1_interval)
        where = " ".join(f"{block}:{value:g}" for block, value in zip(row.schedule.at, row.schedule.values, strict=True))
        star = "" if beaten(row) else " *"
        agrees = share_of(row.agreement, row.agreement_interval)
        return (f"{row.name}{star}", f"{row.macs / 1e9:.4f}", share, distance, agrees, top1, where)

    return Table(title, HEADER, tuple(map(cells, rows)), below=("schedule",), optional=("predicted time", "top-1 % (95 %)"))


def share_of(value: float, interval: tuple[float, float]) -> str:
    """Return a share with its interval, in per cent."""
    return f"{100 * value:.1f} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"


@dataclass(frozen=True)
class CheckReport(Report):
    """A plan measured again, next to the measurement of when it was made."""

    path: str
    target: Target
    before: Measured
    now: Measured
    macs: int
    base: float  # seconds of the unreduced model that the plan was made with
    environment: Mapping[str, Any]

    @property
    def base_moved(self) -> float:
        """Relative change of the unreduced model's time."""
        return self.now.base_seconds.median / self.base - 1

    @property
    def off(self) -> float | None:
        """Relative distance from the target now; milliseconds are scaled by the change of the unreduced model's time."""
        return relative_error(self.target, self.now, self.base)

    @property
    def raw(self) -> float | None:
        """Relative distance from the target, in unscaled milliseconds."""
        return relative_error(self.target, self.now)

    @property
    def line(self) -> str:
        """The result in words."""
        if self.off is None:
            return f"the schedule takes {self.macs} multiply-adds, as planned for {self.target.text}"
        raw = "" if self.raw is None or self.target.kind != "time" else f" (by the clock alone {self.raw:+.1%})"
        return (
            f"planned for {self.target.text}, now off by {self.off:+.1%}{raw}; the unreduced model takes "
            f"{1 + self.base_moved:.0%} of its earlier time"
        )

    def parts(self) -> Iterator[str | Table]:
        yield f"{self.path}: {self.line}."
        yield f"When it was made: {said(self.before)}\nNow: {said(self.now)}"

    def to_json(self) -> dict[str, Any]:
        facts = {
            "path": self.path,
            "target": self.target.to_json(),
            "macs": self.macs,
            "off": self.off,
            "off_raw": self.raw,
            "base": self.base,
        }
        return {
            **facts,
            "base_moved": self.base_moved,
            "before": self.before.to_json(),
            "now": self.now.to_json(),
            "environment": dict(self.environment),
        }


def checked(report: CheckReport) -> CheckReport:
    """Return the report of a plan that still meets its target.

    Raises:
        Refusal: it is off by more than 10 %.
    """
    if report.off is not None and abs(report.off) > TOLERANCE:
        raise Refusal(f"{report.path}: {report.line}. Then: {said(report.before)} Now: {said(report.now)} Plan it again")
    return report
