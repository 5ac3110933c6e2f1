"""Schedules: the number of patch tokens each block keeps, as integers known before the forward starts."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.core import arguments
from laconic.core.values import items, shown

Unit = str
UNITS = ("keep", "keep_counts", "remove_counts", "adaptive")
OLD_UNITS = {"leave": "keep_counts", "remove": "remove_counts", "decide": "adaptive"}  # in files of version 0.1
# (keep rates of the reducing blocks so far, patch tokens at the block's input, patches of the image) -> patch tokens to keep
CountRule = Callable[[Sequence[float], int, int], int]


@dataclass(frozen=True)
class Schedule:
    """Keep rates, counts to keep or counts to remove at the blocks ``at`` (zero-based).

    Build it with `rates`, `keep_counts`, `remove_counts` or `adaptive`. ``values[i]`` belongs to block ``at[i]``.
    """

    at: tuple[int, ...]
    values: tuple[float | int, ...]
    unit: Unit = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", OLD_UNITS.get(self.unit, self.unit))
        if self.unit not in UNITS:
            raise ValueError(f"schedule: unit must be one of {', '.join(map(repr, UNITS))}, not {self.unit!r}")
        at, values = arguments.blocks(self.at), items(self.values)
        if values is None:
            raise TypeError(f"schedule: values must be a sequence, one for each block, not {shown(self.values)}")
        if len(values) != len(at):
            raise ValueError(f"schedule: {len(values)} values for {len(at)} blocks {list(at)}")
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "values", tuple(map(self._checked, values)))

    def _checked(self, value: Any) -> float | int:
        if self.unit == "keep":
            return arguments.rate(value)
        if self.unit != "adaptive":
            return arguments.count(value, self.unit)
        if not isinstance(value, int | float) or value != 1:
            raise ValueError(f"schedule: if the method decides (unit 'adaptive'), each value must be 1, not {shown(value)}")
        return value

    @classmethod
    def rates(cls, keep: float | Sequence[float], at: Sequence[int]) -> Schedule:
        """Return a schedule of keep rates as the method's paper defines them: one for all blocks, or one for each."""
        blocks, values = arguments.blocks(at), arguments.rates(keep)
        return cls(blocks, values if isinstance(values, tuple) else (values,) * len(blocks))

    @classmethod
    def keep_counts(cls, counts: Mapping[int, int]) -> Schedule:
        """Return a schedule of explicit counts: block -> patch tokens it keeps."""
        return cls(*arguments.counts_of("keep_counts", counts), "keep_counts")

    @classmethod
    def remove_counts(cls, counts: Mapping[int, int]) -> Schedule:
        """Return a schedule of counts to remove, as ToMe's: block -> patch tokens it removes, at most half of its input."""
        return cls(*arguments.counts_of("remove_counts", counts), "remove_counts")

    @classmethod
    def adaptive(cls, at: Sequence[int]) -> Schedule:
        """Return a schedule of blocks where the method itself chooses how many tokens of each image to keep."""
        blocks = arguments.blocks(at)
        return cls(blocks, (1,) * len(blocks), "adaptive")

    @classmethod
    def leaving(cls, counts: Mapping[int, int]) -> Schedule:
        """Return `keep_counts`, under its old name."""
        return _renamed("leaving", "keep_counts", cls.keep_counts)(counts)

    @classmethod
    def removing(cls, counts: Mapping[int, int]) -> Schedule:
        """Return `remove_counts`, under its old name."""
        return _renamed("removing", "remove_counts", cls.remove_counts)(counts)

    @classmethod
    def deciding(cls, at: Sequence[int]) -> Schedule:
        """Return `adaptive`, under its old name."""
        return _renamed("deciding", "adaptive", cls.adaptive)(at)

    @classmethod
    def of(cls, value: Schedule | Mapping[str, Any]) -> Schedule:
        """Return a schedule unchanged, or one built from JSON: ``{"at": [3, 6, 9], "keep": [0.7, 0.7, 0.7]}`` (see `UNITS`)."""
        if isinstance(value, Schedule):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"schedule must be a laconic.Schedule or its JSON object, not {type(value).__name__}")
        if "chain" in value:
            return ChainSchedule.join([None if part is None else Schedule.of(part) for part in items(value["chain"]) or ()])
        units = [key for key in value if key != "at"]
        if "at" not in value or len(units) != 1 or OLD_UNITS.get(units[0], units[0]) not in UNITS:
            given = shown(list(value))
            raise ValueError(f"schedule must have 'at' and one of {', '.join(map(repr, UNITS))}; got {given}")
        values = items(value[units[0]])
        if values is None:
            single = shown(value[units[0]])
            raise TypeError(f"schedule: {units[0]} must be a list with a value for each block in 'at', not {single}")
        return cls(arguments.blocks(value["at"]), values, units[0])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `of` reads."""
        return {"at": list(self.at), self.unit: list(self.values)}

    def check_depth(self, depth: int) -> None:
        """Raise ValueError if the model does not have one of the blocks."""
        beyond = [i for i in self.at if i >= depth]
        if beyond:
            raise ValueError(f"schedule: blocks {beyond} are out of range; the model has blocks 0 to {depth - 1}")

    def check_falling(self, stages: Sequence[tuple[int, int]]) -> None:
        """Raise if counts to keep rise within a stage; ``stages`` are (blocks, patches). Counts above the patches are ignored.

        Raises:
            ValueError: a block is to keep more tokens than an earlier block of its stage.
        """
        start = 0
        for depth, patches in stages:
            part = self.part(start, start + depth) if self.unit == "keep_counts" else None
            least, where = patches, 0
            for block, value in () if part is None else zip(part.at, part.values, strict=True):
                if least < value <= patches:
                    raise ValueError(
                        f"schedule: block {start + block} is to keep {value} tokens, but block {start + where} keeps only "
                        f"{least}; counts must not rise"
                    )
                if value < least:
                    least, where = int(value), block
            start += depth

    def part(self, start: int, stop: int) -> Schedule | None:
        """Return the part of the schedule for blocks ``start`` to ``stop`` - 1, with ``start`` as block 0; None if empty."""
        if start == 0 and self.at[-1] < stop:
            return self
        inside = [(block - start, value) for block, value in zip(self.at, self.values, strict=True) if start <= block < stop]
        if not inside:
            return None
        return Schedule(tuple(block for block, _ in inside), tuple(value for _, value in inside), self.unit)

    def counts(self, depth: int, patches: int, rule: CountRule) -> tuple[int, ...]:
        """Return the patch tokens that each of ``depth`` blocks keeps; blocks not in the schedule keep all of their input."""
        steps, n, out, rates = dict(zip(self.at, self.values, strict=True)), patches, [], []
        for block in range(depth):
            if block in steps:
                value = steps[block]
                if self.unit == "keep":
                    rates.append(value)
                    n = min(n, max(1, rule(tuple(rates), n, patches)))
                elif self.unit == "keep_counts":
                    n = min(n, int(value))
                elif self.unit == "remove_counts":
                    n -= min(int(value), n // 2)
            out.append(n)
        return tuple(out)

    def targets(self, depth: int, patches: int, rule: CountRule) -> dict[int, float]:
        """Return the share of the initial patches each reducing block is to keep (the target of a ratio loss)."""
        if self.unit == "keep":
            return {block: cumulative(self.values[: i + 1]) for i, block in enumerate(self.at)}
        counts = self.counts(depth, patches, rule)
        return {block: counts[block] / patches for block in self.at}

    def scaled(self, rate: Callable[[float], float]) -> Schedule:
        """Return this schedule with every keep rate replaced by ``rate(keep)`` (see `WarmIn`)."""
        if self.unit != "keep":
            raise ValueError(f"schedule: only keep rates can be warmed in, and this one has the unit {self.unit}")
        return dataclasses.replace(self, values=tuple(rate(value) for value in self.values))


@dataclass(frozen=True)
class ChainSchedule(Schedule):
    """The schedules of the methods in a `laconic.Chain`, in order; None for a method with no block in this stage.

    ``at`` are the blocks of all of them. The counts are those of `laconic.Chain.counts`.
    """

    parts: tuple[Schedule | None, ...] = ()

    def __post_init__(self) -> None:
        pass  # the parts are checked already

    @classmethod
    def join(cls, parts: Sequence[Schedule | None]) -> ChainSchedule:
        """Return the schedule of a chain.

        Raises:
            ValueError: no part has a block.
        """
        at = tuple(sorted({block for part in parts if part is not None for block in part.at}))
        if not at:
            raise ValueError(
                "schedule: 'chain' must be a list of schedules, one for each method of the chain, not an empty one"
            )
        return cls(at, (1,) * len(at), "chain", tuple(parts))

    def to_json(self) -> dict[str, Any]:
        return {"chain": [None if part is None else part.to_json() for part in self.parts]}

    def check_falling(self, stages: Sequence[tuple[int, int]]) -> None:
        for part in self.parts:
            if part is not None:
                part.check_falling(stages)

    def part(self, start: int, stop: int) -> ChainSchedule | None:
        parts = [None if part is None else part.part(start, stop) for part in self.parts]
        return None if all(part is None for part in parts) else ChainSchedule.join(parts)

    def scaled(self, rate: Callable[[float], float]) -> ChainSchedule:
        return ChainSchedule.join([None if part is None else part.scaled(rate) for part in self.parts])


@dataclass(frozen=True)
class WarmIn:
    """EViT's keep-rate warm-in, per step: 1 before ``start``, then a half cosine down to the keep rate over ``length``."""

    start: int
    length: int

    def __call__(self, schedule: Schedule, step: int) -> Schedule:
        """Return the schedule at a training step."""
        if step < self.start:
            return schedule.scaled(lambda keep: 1.0)
        if step >= self.start + self.length:
            return schedule
        left = 0.5 * (1 + math.cos(math.pi * (step - self.start) / self.length))
        return schedule.scaled(lambda keep: keep + (1 - keep) * left)


def _renamed(old: str, new: str, function: Callable[..., Schedule]) -> Callable[..., Schedule]:
    warnings.warn(f"Schedule.{old} is now Schedule.{new}", DeprecationWarning, stacklevel=3)
    return function


def cumulative(rates: Sequence[float]) -> float:
    """Return the product of the rates so far; for equal rates a power, to round like the published code."""
    return rates[0] ** len(rates) if len(set(rates)) == 1 else math.prod(rates)


def of_the_initial(rates: Sequence[float], n: int, patches: int) -> int:
    """Return DynamicViT's count: int(initial patches * product of the rates)."""
    return int(patches * cumulative(rates))


def quarters(depth: int) -> tuple[int, ...]:
    """Return the blocks at the quarters of the depth: 3, 6, 9 of 12 and 4, 8, 12 of 16, as in the papers."""
    return tuple(sorted({depth * part // 4 for part in (1, 2, 3)}))
