"""`Plan`: the schedule for a budget, with its cost, its measured time and its fidelity; convertible to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from laconic.core.method import resolve
from laconic.core.schedule import Schedule
from laconic.planning.budget import Target
from laconic.planning.fidelity import Judged, Mean
from laconic.planning.timing import Measured

NEAR = 0.03  # a plan with a larger relative error of its measured time is corrected, or gets a note


@dataclass(frozen=True)
class Comparison:
    """Searched schedule minus the papers' uniform one at the same cost, paired by image on held-out images.

    ``distance`` is the difference of the distances to the unreduced model (below zero: the searched one is closer), ``top1``
    the difference of the accuracies. With 95 % confidence intervals.
    """

    distance: Mean
    top1: Mean | None

    @property
    def verdict(self) -> str:
        """The comparison as one sentence."""
        if self.distance.mean + self.distance.half < 0:
            return "the searched schedule is closer to the unreduced model than the uniform one at equal cost"
        if self.distance.mean - self.distance.half > 0:
            return "the searched schedule is WORSE than the uniform one at equal cost"
        return "the searched schedule is not clearly better than the uniform one at equal cost"

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        top1 = None if self.top1 is None else vars(self.top1)
        return {"distance": vars(self.distance), "top1": top1, "verdict": self.verdict}


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    Args:
        method: name and options of the method.
        target: the budget.
        schedule: the schedule, for `laconic.reduce_`.
        macs: multiply-adds of one image.
        baseline_macs: multiply-adds of one image in the unreduced model.
        predicted: predicted speed-up over the unreduced model; None if nothing was measured.
        measured: measured time of the reduced model; None if nothing was measured.
        judged: fidelity on held-out images of the searched schedule and of the papers' uniform one.
        comparison: comparison of these two; None without a search.
        front: fidelity of both shapes at other costs, on the same images.
        evaluated: number of schedules that the search evaluated.
        base_seconds: fastest time of the unreduced model in any measurement (other load only adds time); times are
            planned and checked as if the unreduced model always took this long.
        notes: further remarks for the user.
    """

    method: Mapping[str, Any]
    target: Target
    schedule: Schedule
    macs: int
    baseline_macs: int
    predicted: float | None = None
    measured: Measured | None = None
    judged: tuple[Judged, ...] = ()
    comparison: Comparison | None = None
    front: tuple[Judged, ...] = ()
    evaluated: int = 0
    base_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def off(self) -> float | None:
        """Relative error of the measured time; None if the target is not a time or a speed-up."""
        return None if self.measured is None else relative_error(self.target, self.measured, self.base_seconds)

    @property
    def recipe(self) -> str:
        """The ``[method]`` table of a recipe for ``laconic train``, in TOML."""
        at, values = (json.dumps(list(part)) for part in (self.schedule.at, self.schedule.values))
        lines = [f'name = "{self.method["name"]}"', f"schedule = {{ at = {at}, {self.schedule.unit} = {values} }}"]
        usual = resolve(self.method["name"], {}).describe()["options"]
        others = {name: value for name, value in self.method["options"].items() if value != usual[name]}
        if others:
            lines.append(f"options = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in others.items())} }}")
        return "\n".join(["[method]", *lines])

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields = {**vars(self), "method": dict(self.method), "target": self.target.to_json(), "off": self.off}
        for name in ("schedule", "measured", "comparison"):
            value = getattr(self, name)
            fields[name] = None if value is None else value.to_json()
        for name in ("judged", "front"):
            fields[name] = [judged.to_json() for judged in getattr(self, name)]
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain


def relative_error(target: Target, measured: Measured, base: float | None = None) -> float | None:
    """Return the relative error of a measured time or speed-up against its target; above zero is too slow.

    ``base`` is the time in seconds of the unreduced model on an idle machine, which scales the measured ratio to seconds;
    None uses the measured seconds as they are.
    """
    if target.kind == "speedup":
        return target.value / measured.ratio.median - 1
    seconds = measured.seconds.median if base is None else base / measured.ratio.median
    return seconds / target.value - 1 if target.kind == "time" else None


def remarks(measured: Measured | None, target: Target, base: float | None = None) -> list[str]:
    """Return notes on a measured time, for the user."""
    if measured is None:
        return []
    off, clock, notes = relative_error(target, measured, base), relative_error(target, measured), list[str]()
    if off is not None and abs(off) > NEAR:
        notes.append(f"measured, it is {abs(off):.1%} {'slower' if off > 0 else 'faster'} than the target")
    if clock is not None and off is not None and abs(clock - off) > NEAR:
        fastest, now = 1e3 * (base or 0), 1e3 * measured.base_seconds.median
        notes.append(
            f"in raw milliseconds it is {clock:+.1%} off: the unreduced model took {now:.1f} ms now, and {fastest:.1f} ms "
            "at its fastest"
        )
    if measured.ratio.median < 1:
        verdict = "it is SLOWER" if measured.ratio.high < 1 else "it is no faster"
        notes.append(
            f"at batch {measured.batch_size} {verdict} than the unreduced model ({measured.ratio.median:.2f}x): here the "
            "reducer costs as much as it saves, or more; larger batches, larger models and larger images gain"
        )
    if measured.base_seconds.high > 1.25 * measured.base_seconds.low:
        low, high = (1e3 * seconds for seconds in (measured.base_seconds.low, measured.base_seconds.high))
        notes.append(
            f"the unreduced model itself took {low:.1f} to {high:.1f} ms (quartiles): other load disturbed the measurement"
        )
    return notes
