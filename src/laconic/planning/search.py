"""Beam search for the blocks and counts that meet a budget and change a model's outputs least.

A candidate is a set of blocks, each with a weight: how strongly it reduces. For every candidate the keep rate is solved so
that the budget is just met; all candidates therefore cost the same, and only their shapes compete. The best few are kept and
mutated at random, one change at a time. The random numbers come from a seed, so that a search that was stopped repeats the
same steps with the cached scores, and then continues.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laconic.core.schedule import Schedule
from laconic.planning.progress import ticking
from laconic.planning.space import ScheduleSpace

Weights = Mapping[int, float]  # block -> how strongly it reduces
Score = Callable[[Schedule], float]  # lower is better
BEAM = 4
SPREAD = 0.5  # standard deviation of the change of a weight's logarithm
TRIES = 20  # the search ends after this many mutations in a row that give no new schedule


@dataclass(frozen=True)
class Found:
    """A candidate: its weights, its schedule and its score."""

    weights: tuple[tuple[int, float], ...]
    schedule: Schedule
    score: float


class Search:
    """A search at one budget.

    Args:
        space: the schedules and their costs.
        limit: the highest cost of a schedule.
        score: returns the distance of a schedule's outputs from the unreduced model's; it may raise ValueError or
            LookupError if the method rejects the schedule.
        seed: seed of the random changes.
        blocks: blocks that may reduce (default: all).
    """

    def __init__(
        self, space: ScheduleSpace, limit: float, score: Score, seed: int = 0, blocks: Sequence[int] | None = None
    ) -> None:
        self.space, self.limit, self.score = space, limit, score
        self.random, self.blocks = random.Random(seed), tuple(range(space.depth) if blocks is None else blocks)
        self.seen = dict[Schedule, Found]()

    def run(self, first: Sequence[Found], steps: int) -> list[Found]:
        """Evaluate the initial shapes, then mutations of the best, up to ``steps`` new schedules.

        Return all candidates, ``first`` included, best first.
        """
        self.seen = {found.schedule: found for found in first}
        waiting = [dict(weights) for weights in shapes(self.blocks)]
        with ticking(steps, "searching", "schedule") as tick:
            tried = stale = 0
            while tried < steps and stale < TRIES:
                weights = waiting.pop(0) if waiting else self.changed(dict(self.random.choice(self.best(BEAM)).weights))
                new = self.consider(weights)
                tried, stale = (tried + 1, 0) if new else (tried, stale + (not waiting))
                if new:
                    tick()
        return self.best(len(self.seen))

    def best(self, count: int) -> list[Found]:
        """Return the best candidates so far."""
        return sorted(self.seen.values(), key=lambda found: found.score)[:count]

    def consider(self, weights: Weights) -> bool:
        """Fit these weights to the budget and score the schedule; return True if it meets the budget and is new."""
        family = self.space.weighted(weights)
        try:
            schedule = self.space.fit(family, self.limit)
        except ValueError:  # the method can follow no schedule of these weights
            return False
        schedule = None if schedule is None else self.space.simplify(schedule)
        if schedule is None or schedule in self.seen:
            return False
        try:
            score = self.score(schedule)
        except (ValueError, LookupError):  # the method rejects one of these blocks
            score = math.inf
        self.seen[schedule] = Found(tuple(sorted(weights.items())), schedule, score if math.isfinite(score) else math.inf)
        return True

    def changed(self, weights: dict[int, float]) -> dict[int, float]:
        """Apply one random change: reduce more or less at a block, move a block, add one, or remove one."""
        block, free = self.random.choice(sorted(weights)), [b for b in self.blocks if b not in weights]
        kind = self.random.choice(("strength", "strength", "move", "add", "drop"))
        if kind == "move" and free:
            nearest = sorted(free, key=lambda other: (abs(other - block), other))[:2]
            weights[self.random.choice(nearest)] = weights.pop(block)
        elif kind == "add" and free:
            weights[self.random.choice(free)] = sum(weights.values()) / len(weights)
        elif kind == "drop" and len(weights) > 1:
            del weights[block]
        else:
            weights[block] *= math.exp(self.random.gauss(0, SPREAD))
        return weights


def shapes(blocks: Sequence[int]) -> list[Weights]:
    """Return the initial shapes: all blocks but the first and last, every other one, the early ones, the late ones."""
    inner, depth = tuple(blocks[1:-1] or blocks), len(blocks)
    parts = (inner, inner[::2], inner[: max(1, depth // 2)], inner[depth // 3 :] or inner, inner[: max(1, depth // 4)])
    return [dict.fromkeys(chosen, 1.0) for chosen in dict.fromkeys(parts)]


def weights_of(space: ScheduleSpace, schedule: Schedule) -> dict[int, float]:
    """Return how strongly each block of a schedule reduces: -log(keep rate) divided by its mean over the blocks."""
    facts = zip(schedule.at, schedule.values, space.arriving(schedule), strict=True)
    logs = {block: math.log(n / value) if schedule.unit == "keep_counts" else 1.0 for block, value, n in facts}
    weights = {block: log for block, log in logs.items() if log > 0}
    mean = sum(weights.values()) / max(1, len(weights))
    return {block: log / mean for block, log in weights.items()}
