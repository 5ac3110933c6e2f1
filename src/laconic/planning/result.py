"""`Plan`: a budget as a schedule, with what it costs, how it was measured and how faithful it is; as JSON and back."""

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

NEAR = 0.03  # a measured time that is farther from its target is corrected, or remarked on


@dataclass(frozen=True)
class Comparison:
    """The searched schedule less the papers' uniform one at the same cost, image by image on held-out images.

    ``distance`` is how much farther its answers are from the unreduced model's (below zero: nearer), ``top1`` how much
    more often they are right. With 95 % intervals.
    """

    distance: Mean
    top1: Mean | None

    @property
    def verdict(self) -> str:
        """In words, and plainly."""
        if self.distance.mean + self.distance.half < 0:
            return "the searched schedule is nearer to the unreduced model than the uniform one at equal cost"
        if self.distance.mean - self.distance.half > 0:
            return "the searched schedule is WORSE than the uniform one at equal cost"
        return "the searched schedule is not clearly better than the uniform one at equal cost"

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        top1 = None if self.top1 is None else vars(self.top1)
        return {"distance": vars(self.distance), "top1": top1, "verdict": self.verdict}


@dataclass(frozen=True)
class Plan:
    """What was planned.

    Args:
        method: name and options.
        target: the budget.
        schedule: what `laconic.reduce_` takes.
        macs: multiply-adds of one image, and those of the unreduced model.
        predicted: how many times quicker than the unreduced model it should be; None where nothing was measured.
        measured: how quick the real reduced model was; None where nothing was measured.
        judged: fidelity on held-out images: the searched schedule, and the papers' uniform one.
        comparison: of these two; None where nothing was searched.
        front: fidelity at other costs, of both shapes, on the same images.
        evaluated: schedules that the search looked at.
        base_seconds: the least that the unreduced model took in any measurement (others can only slow it down): a time is
            planned, and judged, as if it always took that.
        notes: what is to be known besides.
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
        """How far the measured time is from the target, as a share of it; None where the target speaks of no time."""
        return None if self.measured is None else off_target(self.target, self.measured, self.base_seconds)

    @property
    def recipe(self) -> str:
        """The method's part of a recipe for ``laconic train``, in TOML."""
        at, values = (json.dumps(list(part)) for part in (self.schedule.at, self.schedule.values))
        lines = [f'name = "{self.method["name"]}"', f"schedule = {{ at = {at}, {self.schedule.unit} = {values} }}"]
        usual = resolve(self.method["name"], {}).describe()["options"]
        others = {name: value for name, value in self.method["options"].items() if value != usual[name]}
        if others:
            lines.append(f"options = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in others.items())} }}")
        return "\n".join(["[method]", *lines])

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON."""
        fields = {**vars(self), "method": dict(self.method), "target": self.target.to_json(), "off": self.off}
        for name in ("schedule", "measured", "comparison"):
            value = getattr(self, name)
            fields[name] = None if value is None else value.to_json()
        for name in ("judged", "front"):
            fields[name] = [judged.to_json() for judged in getattr(self, name)]
        plain: dict[str, Any] = json.loads(json.dumps(fields))
        return plain


def off_target(target: Target, measured: Measured, base: float | None = None) -> float | None:
    """How far what was measured is from a target of time, as a share of it: above zero, too slow.

    ``base``: seconds that the unreduced model takes where nothing disturbs; None: by the clock as it was.
    """
    if target.kind == "speedup":
        return target.value / measured.ratio.median - 1
    seconds = measured.seconds.median if base is None else base / measured.ratio.median
    return seconds / target.value - 1 if target.kind == "time" else None


def remarks(measured: Measured | None, target: Target, base: float | None = None) -> list[str]:
    """What is to be said of a measured time."""
    if measured is None:
        return []
    off, clock, notes = off_target(target, measured, base), off_target(target, measured), list[str]()
    if off is not None and abs(off) > NEAR:
        notes.append(f"measured, it is {abs(off):.1%} {'slower' if off > 0 else 'quicker'} than the target")
    if clock is not None and off is not None and abs(clock - off) > NEAR:
        calm, now = 1e3 * (base or 0), 1e3 * measured.base_seconds.median
        notes.append(
            f"by the clock alone it is {clock:+.1%} off: the unreduced model has taken {calm:.1f} ms, and now took {now:.1f}"
        )
    if measured.ratio.median < 1:
        clear = "it is SLOWER" if measured.ratio.high < 1 else "it is no quicker"
        notes.append(
            f"at batch {measured.batch_size} {clear} than the unreduced model ({measured.ratio.median:.2f}x): here the reducer "
            "costs as much as it saves, or more; larger batches, larger models and longer inputs gain"
        )
    if measured.base_seconds.high > 1.25 * measured.base_seconds.low:
        low, high = (1e3 * seconds for seconds in (measured.base_seconds.low, measured.base_seconds.high))
        notes.append(
            f"the unreduced model itself took {low:.1f} to {high:.1f} ms (quartiles): the machine had other things to do"
        )
    return notes
