"""Where, and how much: a search for the schedule of a budget that changes a model's answers least.

A candidate is a set of blocks with a weight each: how strongly it reduces there. Whatever the weights, the one keep rate
behind them is solved so that the budget is just met; so all candidates cost the same, and only their shapes compete. The
best few are kept, and changed at random, one change at a time. The random numbers come from a seed, so that with the scores
that are known already a search that was stopped takes the same way again, and goes on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laconic.core.schedule import Schedule
from laconic.planning.progress import ticking
from laconic.planning.space import Space

Weights = Mapping[int, float]  # block -> how strongly it reduces
Score = Callable[[Schedule], float]  # the less, the better
BEAM = 4
SPREAD = 0.5  # standard deviation of the logarithm of a changed weight
TRIES = 20  # changes in a row that lead to what is known, before the search ends


@dataclass(frozen=True)
class Found:
    """A candidate: its shape, its schedule, and how good it is."""

    weights: tuple[tuple[int, float], ...]
    schedule: Schedule
    score: float


class Search:
    """A search at one budget.

    Args:
        space: the schedules and their price.
        limit: the most that a schedule may cost.
        score: how far a schedule's answers are from the unreduced model's; it may raise ValueError where there are none.
        seed: of the random changes.
        blocks: at which it may reduce (default: all).
    """

    def __init__(self, space: Space, limit: float, score: Score, seed: int = 0, blocks: Sequence[int] | None = None) -> None:
        self.space, self.limit, self.score = space, limit, score
        self.random, self.blocks = random.Random(seed), tuple(range(space.depth) if blocks is None else blocks)
        self.seen = dict[Schedule, Found]()

    def run(self, first: Sequence[Found], steps: int) -> list[Found]:
        """The best of all, best first, after these, the usual shapes and so many candidates; never worse than ``first``."""
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
        """The best so far."""
        return sorted(self.seen.values(), key=lambda found: found.score)[:count]

    def consider(self, weights: Weights) -> bool:
        """Fit these weights to the budget, and score the schedule; whether it was a new one that meets it."""
        family = self.space.weighted(weights)
        try:
            schedule = self.space.fit(family, self.limit)
        except ValueError:  # there is none that the method can follow
            return False
        schedule = None if schedule is None else self.space.tidy(schedule)
        if schedule is None or schedule in self.seen:
            return False
        try:
            score = self.score(schedule)
        except (ValueError, LookupError):  # the method refuses one of these blocks
            score = math.inf
        self.seen[schedule] = Found(tuple(sorted(weights.items())), schedule, score if math.isfinite(score) else math.inf)
        return True

    def changed(self, weights: dict[int, float]) -> dict[int, float]:
        """One change at random: reduce more or less at a block, move it, add one, or leave one out."""
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
    """Shapes to begin with: everywhere but in the first and last block, every other block, early ones, late ones."""
    inner, depth = tuple(blocks[1:-1] or blocks), len(blocks)
    parts = (inner, inner[::2], inner[: max(1, depth // 2)], inner[depth // 3 :] or inner, inner[: max(1, depth // 4)])
    return [dict.fromkeys(chosen, 1.0) for chosen in dict.fromkeys(parts)]


def weights_of(space: Space, schedule: Schedule) -> dict[int, float]:
    """How strongly each block of a schedule reduces: the logarithm of what it takes, beside the others'."""
    facts = zip(schedule.at, schedule.values, space.arriving(schedule), strict=True)
    logs = {block: math.log(n / value) if schedule.unit == "keep_counts" else 1.0 for block, value, n in facts}
    weights = {block: log for block, log in logs.items() if log > 0}
    mean = sum(weights.values()) / max(1, len(weights))
    return {block: log / mean for block, log in weights.items()}
