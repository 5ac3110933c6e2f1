"""Search blocks and token counts near the schedule of a candidate of `laconic.tune`, at equal multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from laconic.planning.search import Found, Search, weights_of
from laconic.planning.space import ScheduleSpace
from laconic.planning.trials import Trial


def refined(space: ScheduleSpace, trial: Trial, score: Callable[[Trial], float], steps: int) -> Trial | None:
    """Return the best schedule of a search as another candidate, or None if none is better than the trial's own.

    Args:
        space: the schedules of the trial's method and input size.
        trial: a candidate with a schedule.
        score: the measure of a trial, higher is better; it may raise ValueError or LookupError if the method refuses it.
        steps: the number of schedules to try.
    """
    own, config = trial.schedule, trial.candidate.config
    if own is None or config is None or steps < 1 or space.depth < 2:
        return None
    start = Found(tuple(sorted(weights_of(space, own).items())), own, -score(trial))
    blocks = None if config.default_schedule(space.depth, 0.5, None).at[0] == 0 else range(1, space.depth)
    search = Search(space, float(trial.macs), lambda schedule: -score(replace(trial, schedule=schedule)), blocks=blocks)
    best = search.run([start], steps)[0]
    summary = space.summary(best.schedule)
    if best is start or summary is None or best.score >= start.score:
        return None
    at = " ".join(str(block) for block in best.schedule.at)
    place = trial.candidate.name.rpartition(", ")[0]
    chosen = replace(trial.candidate, name=f"{place}, searched blocks {at}", weights=best.weights)
    cost = trial.cost * summary.macs / trial.macs
    return replace(trial, candidate=chosen, schedule=best.schedule, macs=summary.macs, cost=cost, score=-best.score)
