"""Predict the time of a schedule on this machine, from a table of block and reducer times measured in real forwards.

The unreduced model and a few reduced ones run in turn, and every block is timed inside the forward, with all overhead of
the reduction around it. Every time is a share of the unreduced forward of the same round, so that other load on the machine
cancels; each share is the median over the rounds. The table holds, for each stage of the backbone, the time of a block as a
function of its tokens (a curve), the time spent outside the blocks, and the extra cost of a reducer.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.analysis import layer_macs as work
from laconic.analysis.macs import CONVENTIONS, weigh
from laconic.analysis.summary import BlockCost, Summary
from laconic.core.backbone import StageSpec
from laconic.core.schedule import Schedule
from laconic.planning.curve import Curve, not_negative
from laconic.planning.space import ScheduleFamily, ScheduleSpace
from laconic.planning.timing import BASE, Measuring, Times, time_all

RATES = (0.9, 0.75, 0.6, 0.45, 0.3)  # keep rates at each of three reducing blocks; with another number of blocks they are
# changed so that as many tokens are kept in the end
FEATURES = 3  # number of features that the cost of a reducer depends on, see `features`


@dataclass(frozen=True)
class Table:
    """Times of the parts of a forward, as shares of the unreduced forward.

    Args:
        seconds: time of the unreduced forward of a batch when the table was measured.
        outside: time outside the blocks: patch embedding, head, and overhead of the reduction.
        blocks: time of each block with all tokens.
        attention: share of each block's multiply-adds that comes before its MLP.
        stages: the stage of each block.
        starts: block -> patch tokens entering it, for the first block of each stage.
        curves: for each stage, tokens -> a block's time as a share of its time with all tokens.
        reducer: weights of the cost of a reducer: a constant, the cost if it gets all patch tokens of the first stage, and
            the cost of as many multiply-adds as the unreduced model has (see `features`).
    """

    seconds: float
    outside: float
    blocks: tuple[float, ...]
    attention: tuple[float, ...]
    stages: tuple[int, ...]
    starts: Mapping[int, int]
    curves: tuple[Curve, ...]
    reducer: tuple[float, ...]

    def __call__(self, summary: Summary) -> float:
        """Return the predicted time as a share of the unreduced forward."""
        layers = sum(self.block(cost) for cost in summary.blocks)
        rows = list(features(summary, self.starts).values())
        return self.outside + layers + sum(_times(self.reducer, row) for row in rows)

    def block(self, cost: BlockCost) -> float:
        """Return the time of a block's layers, without its reducer."""
        curve, first = self.curves[self.stages[cost.block]], self.attention[cost.block]
        both = first * curve(cost.attention_tokens) + (1 - first) * curve(cost.mlp_tokens)
        return self.blocks[cost.block] * both

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        curves = [{"tokens": list(curve.x), "share": list(curve.y)} for curve in self.curves]
        starts = {str(block): patches for block, patches in self.starts.items()}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {**plain, "starts": starts, "curves": curves}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Table:
        """Build a table from the output of `to_json`."""
        given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        curves = tuple(Curve(tuple(curve["tokens"]), tuple(curve["share"])) for curve in fields["curves"])
        starts = {int(block): patches for block, patches in fields["starts"].items()}
        return cls(**{**given, "curves": curves, "starts": starts})


def measure_table(space: ScheduleSpace, family: ScheduleFamily, measuring: Measuring) -> Table:
    """Measure the table on this machine, with schedules of this family that keep many, some and few tokens."""
    schedules = sampled(space, family)
    times = time_all(space, schedules, measuring)
    summaries = [summary for schedule in schedules if (summary := space.summary(schedule)) is not None]
    return table_of(space, summaries, times)


def sampled(space: ScheduleSpace, family: ScheduleFamily) -> list[Schedule]:
    """Return the schedules to measure."""
    count, least = len(family(1.0).at), space.least(family)
    rates = [max(least, rate ** (3 / count)) for rate in RATES]
    return list(dict.fromkeys(family(rate) for rate in rates))


def table_of(space: ScheduleSpace, summaries: Sequence[Summary], times: Mapping[str, Times]) -> Table:
    """Build the table from the times of the unreduced model and of one reduced model for each summary."""
    base = times[BASE]
    own = tuple(statistics.median(shares) for shares in zip(*_shares(base), strict=True))
    stages = tuple(stage for stage, shape in enumerate(space.shapes) for _ in range(shape.depth))
    shares = [_shares(times[str(number)]) for number in range(len(summaries))]
    outside = [
        statistics.median([s.own.wall / s.base.wall - sum(row) for s, row in zip(times[str(i)].samples, rows, strict=True)])
        for i, rows in enumerate(shares)
    ]
    curves = tuple(_curve(number, shape, stages, own, summaries, shares) for number, shape in enumerate(space.shapes))
    seconds = statistics.median([sample.own.wall for sample in base.samples])
    attention = tuple(first_half(space, index) for index in range(space.depth))
    table = Table(seconds, statistics.median(outside), own, attention, stages, space.starts, curves, ())
    rows, over = list[tuple[float, ...]](), list[float]()
    for summary, measured in zip(summaries, shares, strict=True):
        for block, row in features(summary, space.starts).items():
            rows.append(row)
            over.append(statistics.median([share[block] for share in measured]) - table.block(summary.blocks[block]))
    return dataclasses.replace(table, reducer=not_negative(rows, over, FEATURES))


def _shares(times: Times) -> list[list[float]]:
    """Return each block's time as a share of the unreduced forward of the same round, for each run."""
    return [[s / sample.base.wall for s in row] for sample, row in zip(times.samples, times.blocks, strict=True)]


def _curve(
    stage: int,
    shape: StageSpec,
    stages: Sequence[int],
    own: Sequence[float],
    summaries: Sequence[Summary],
    shares: Sequence[Sequence[Sequence[float]]],
) -> Curve:
    """Fit the time of a stage's blocks as a function of their tokens, from the blocks that do not reduce."""
    found = dict[float, list[tuple[float, int]]]()
    for summary, measured in zip(summaries, shares, strict=True):
        groups = dict[int, list[int]]()
        for cost in summary.blocks:
            if stages[cost.block] == stage and cost.attention_tokens == cost.mlp_tokens and not cost.reducer_macs:
                groups.setdefault(cost.mlp_tokens, []).append(cost.block)
        for tokens, blocks in groups.items():
            whole = sum(own[block] for block in blocks)
            share = statistics.median([sum(row[block] for block in blocks) / whole for row in measured])
            found.setdefault(tokens, []).append((share, len(blocks)))
    found.setdefault(shape.patches + shape.prefix, [(1.0, 1)])
    means = dict[float | int, tuple[float, float]]()
    for number, points in found.items():
        weight = sum(count for _, count in points)
        means[number] = (sum(share * count for share, count in points) / weight, float(weight))
    return Curve.through(means)


def features(summary: Summary, starts: Mapping[int, int]) -> dict[int, tuple[float, ...]]:
    """Return the features that predict a reducer's cost, for each reducing block: [1, its tokens, its multiply-adds].

    Tokens are relative to the patch tokens of the first stage, multiply-adds to those of the unreduced model.
    """
    return {block: row for block, row in _features(summary, starts) if row}


def _features(summary: Summary, starts: Mapping[int, int]) -> Iterator[tuple[int, tuple[float, ...]]]:
    before = 0
    for cost, kept in zip(summary.blocks, summary.tokens, strict=True):
        before = starts.get(cost.block, before)
        reduces = kept < before or cost.reducer_macs > 0
        yield cost.block, (1.0, before / starts[0], cost.reducer_macs / summary.baseline_macs) if reduces else ()
        before = kept


def _times(weights: Sequence[float], row: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, row, strict=True))


def first_half(space: ScheduleSpace, index: int) -> float:
    """Return the share of a block's multiply-adds that comes before its MLP."""
    shape = next(s for start, s in zip(reversed(space.starts), reversed(space.shapes), strict=True) if index >= start)
    whole, weights = shape.patches + shape.prefix, CONVENTIONS["matmul"]
    few = max(1, whole // 2)
    block = space.entry.blocks(space.host)[index]
    total, less = (weigh(work.block(block, whole, n, shape), weights) for n in (whole, few))
    return 1 - (total - less) * whole / ((whole - few) * total) if whole > few else 1.0
