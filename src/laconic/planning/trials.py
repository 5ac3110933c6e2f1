"""A candidate of `laconic.tune` with its schedule, and what is known of it so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from laconic.analysis.equal_time import bootstrap, over_smaller_input
from laconic.analysis.timing import Quartiles
from laconic.core.schedule import Schedule
from laconic.methods.chain import Chain
from laconic.planning.candidates import Candidate
from laconic.planning.scores import Values
from laconic.planning.space import ChainSpace, ScheduleSpace
from laconic.planning.tuned import TunedRow

TOO_SLOW = 1.25  # times the target: a candidate that costs less is shown, since it nearly meets it


@dataclass
class Trial:
    """A candidate with its schedule, and what is known of it so far. ``cost`` is a share of the unreduced model's."""

    candidate: Candidate
    schedule: Schedule | None
    macs: int
    score: float = -math.inf
    cost: float = math.nan
    speed: Quartiles | None = None

    def applied(self) -> tuple[Any, Schedule | None]:
        """Return the method and schedule to reduce the model with; a chain holds its schedules itself."""
        config, first = self.candidate.config, self.candidate.first
        if first is None:
            return config, self.schedule
        return Chain((first[0], {"keep": first[1]}), (config, {"schedule": self.schedule})), None

    def described(self) -> dict[str, Any]:
        """Return what is run, as plain JSON."""
        config, schedule = self.applied()
        return {
            "sides": self.candidate.sides,
            "method": None if config is None else config.describe(),
            "schedule": None if schedule is None else schedule.to_json(),
        }


def row_of(trial: Trial, values: Values, inputs: Sequence[tuple[float, Values]]) -> TunedRow:
    """Return the row of a candidate by its scores of held-out images, next to smaller inputs with their costs."""
    c, (config, schedule) = trial.candidate, trial.applied()
    over = None if c.is_plain else over_smaller_input(values, inputs, trial.cost)
    described = None if config is None else config.describe()
    search = trial.score if math.isfinite(trial.score) else None
    speed = trial.speed or Quartiles(1 / trial.cost, 1 / trial.cost, 1 / trial.cost)
    return TunedRow(c.name, c.sides, described, schedule, trial.macs, speed, search, bootstrap(values), over)


def space_of(model: nn.Module, candidate: Candidate) -> ScheduleSpace:
    """Return the schedules that a candidate can follow on a model of its input size."""
    config, first = candidate.config, candidate.first
    assert config is not None
    return ScheduleSpace(model, config) if first is None else ChainSpace(model, *first, config)


def best_of(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Return the candidates with the highest scores."""
    return sorted(trials, key=lambda trial: -trial.score)[:count]


def finalists(trials: Sequence[Trial], count: int) -> list[Trial]:
    """Return the ``count`` candidates with the highest scores, and all baselines."""
    baselines = [trial for trial in trials if trial.candidate.baseline]
    return [*best_of([trial for trial in trials if not trial.candidate.baseline], count), *baselines]


def likeliest(trials: Sequence[Trial], number: int) -> list[Trial]:
    """Return the first ``number`` candidates (see `laconic.planning.candidates.candidates`) and all baselines."""
    others = [trial for trial in trials if not trial.candidate.baseline]
    return [*others[:number], *(trial for trial in trials if trial.candidate.baseline)]


def refitted(trials: Sequence[Trial], again: Sequence[Trial | None], limit: float) -> tuple[list[Trial], list[Trial]]:
    """Return the candidates, those fitted ``again`` without a score, and apart from them those that cannot meet the limit.

    These cost more than `TOO_SLOW` times ``limit`` and have no other schedule. All stay if only baselines would.
    """
    others = [(t, new) for t, new in zip(trials, again, strict=True) if not t.candidate.baseline]
    slow = [t for t, new in others if new is None and t.cost > TOO_SLOW * limit]
    if len(slow) == len(others):
        slow = []
    left = [t if new is None else replace(new, score=-math.inf) for t, new in zip(trials, again, strict=True) if t not in slow]
    return left, slow


def worth_repair(best: Trial, trials: Sequence[Trial], limit: float) -> list[Trial]:
    """Return the chosen candidate, and the largest smaller input that costs at most ``limit``."""
    inputs = [t for t in trials if t.candidate.is_plain and t is not best and t.cost <= limit]
    return [best, *sorted(inputs, key=lambda t: -t.cost)[:1]]


def named(group: Sequence[Candidate]) -> str:
    """Return candidates in words: their methods, and their number if there are several."""
    known = [(c.config.info.name, c.first) for c in group if c.config is not None]
    names = dict.fromkeys(name if first is None else f"{first[0].info.name} with {name}" for name, first in known)
    return ", ".join(names) + (f" ({len(group)} candidates)" if len(group) > 1 else "")
