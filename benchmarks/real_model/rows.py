"""The rows of the evidence: an input size and a way to reduce the tokens of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import laconic
from laconic.core.half_limit import HALF
from laconic.core.method import METHODS
from laconic.core.schedule import Schedule
from laconic.methods.ops import BeforeBlocks

PATCH, SIZE, DEPTH = 14, 224, 12
SITES = (3, 6, 9)  # a quarter, a half and three quarters of the depth, where the papers reduce
KEEPS = (0.9, 0.7, 0.5, 0.3)
SMALLER = (210, 196, 182, 168, 154, 140, 126, 112)
EXCLUDED = ("avit", "evovit", "heuristic")  # halts in the last block; needs its training; keeps the middle of the picture


@dataclass(frozen=True)
class Row:
    """A row: ``size`` pixels a side, and a method with its settings ("" for the unreduced model).

    ``keep`` and ``at`` are the keep rate and the reducing blocks (empty: the method's usual ones). If ``total`` is set, tokens
    are removed in equal steps at the blocks ``at`` until this share of the patches is left. ``first`` is the method and keep
    rate of a reduction before the first block; the settings of ``method`` are then relative to the tokens that it leaves.
    """

    size: int = SIZE
    method: str = ""
    keep: float | None = None
    at: tuple[int, ...] = SITES
    total: float | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    first: tuple[str, float] | None = None

    @property
    def key(self) -> str:
        """A unique name."""
        if not self.method:
            return f"input {self.size}"
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        blocks = " ".join(map(str, self.at))
        share = f"keep {self.keep:g}" if self.total is None else f"to {self.total:.0%}"
        place = f"{self.size} px, " if self.size != SIZE else ""
        if self.first is not None:
            place += f"{self.first[0]} keep {self.first[1]:g}, then "
        return f"{place}{self.method}{options} {share}" + (f" at {blocks}" if blocks else "")

    @property
    def plain(self) -> bool:
        """True for the unreduced model, at any input size."""
        return not self.method

    def schedule(self) -> Schedule:
        """Return the schedule of a row with a method."""
        if self.total is None:
            if METHODS[self.method].count == "variable":
                return Schedule.adaptive(self.at)
            if not self.at:
                return METHODS[self.method].config().default_schedule(DEPTH, self.keep, None)
            return Schedule.rates(self.keep or 1.0, self.at)
        patches = (self.size // PATCH) ** 2
        if self.first is not None:
            name, keep = self.first
            patches = METHODS[name].config().counts(Schedule.rates(keep, (0,)), 1, patches)[0]
        step = patches * (1 - self.total) / len(self.at)
        return Schedule.keep_counts({block: round(patches - step * n) for n, block in enumerate(self.at, 1)})

    def apply(self, model: nn.Module, *, restore: bool = False) -> nn.Module:
        """Reduce ``model``, which was loaded at this row's size, in place."""
        if self.plain:
            return model
        if self.first is None:
            return laconic.reduce_(model, self.method, schedule=self.schedule(), restore=restore, **self.options)
        name, keep = self.first
        second = (self.method, {**self.options, "schedule": self.schedule()})
        return laconic.reduce_(model, laconic.Chain((name, {"keep": keep}), second), restore=restore)


BASE = Row()
BOTH = Row(method="etps", keep=0.4, at=(6, 8, 10), first=("pre-merge", 0.7))  # fewer before the blocks, and the attended later


def training_free() -> list[str]:
    """Return the methods that need no training and have constant counts."""
    free = [name for name, method in METHODS.items() if not method.learns and method.count != "variable"]
    return [name for name in free if name not in (*EXCLUDED, "two-stage")]


def two_stage(size: int = SIZE, keeps: tuple[float, ...] = (0.3, 0.25, 0.2, 0.15)) -> tuple[Row, ...]:
    """Return rows of two-stage merging by the share of the patches that is left."""
    return tuple(Row(size, "two-stage", keep=keep, at=()) for keep in keeps)


def usual_blocks(name: str) -> tuple[int, ...]:
    """Return the blocks at which a method reduces: the first for methods before it, and the papers' for all others."""
    return (0,) if issubclass(METHODS[name].config, BeforeBlocks) else SITES


def every_method(keeps: tuple[float, ...] = KEEPS) -> tuple[Row, ...]:
    """Return all methods that need no training, at the papers' blocks, and smaller inputs."""
    rows = [BASE, *map(Row, SMALLER)]
    for keep in keeps:
        names = (n for n in training_free() if keep >= HALF or not METHODS[n].config.removes_at_most_half)
        rows += [Row(method=name, keep=keep, at=usual_blocks(name)) for name in names]
    return tuple(rows)


LATE = (4, 5, 6, 7, 8, 9)


def late_merging() -> tuple[Row, ...]:
    """Return rows that merge late in small steps, at several input sizes."""
    rows = []
    for method in ("tome", "atc", "pitome"):
        rows += [Row(method=method, total=total, at=LATE) for total in (0.5, 0.35, 0.25)]
        rows += [Row(method=method, total=0.25, at=(3, 4, 5, 6, 7, 8))]
        rows += [Row(196, method, total=total, at=LATE) for total in (0.5, 0.25)]
        rows += [Row(182, method, total=total, at=LATE) for total in (0.5, 0.25)]
        rows += [Row(168, method, total=total, at=LATE) for total in (0.35, 0.25)]
    return tuple(rows)


def late_selection() -> tuple[Row, ...]:
    """Return rows that keep the attended tokens from later blocks on, where class attention knows the object."""
    rows = []
    for method in ("etps", "bat", "evit", "topk", "atc", "random"):
        rows.append(Row(method=method, keep=0.4, at=(6, 8, 10)))
    for method in ("etps", "bat"):
        rows += [
            Row(method=method, keep=0.3, at=(8, 10)),
            Row(182, method, keep=0.4, at=(6, 8, 10)),
        ]
    return (BASE, *map(Row, SMALLER), *rows)


def small() -> tuple[Row, ...]:
    """Return the rows that are compared on small things."""
    return (*every_method((0.5,)), *fewest(), *two_stage(keeps=(0.3, 0.2)))


def few() -> tuple[Row, ...]:
    """Return the rows that are compared on many pictures."""
    return (
        BASE,
        Row(182),
        Row(154),
        *(Row(method=name, keep=0.5) for name in ("etps", "bat", "evit", "tome", "atc", "random")),
        *(Row(method=name, keep=0.4, at=(6, 8, 10)) for name in ("etps", "bat", "random")),
        Row(182, "etps", keep=0.4, at=(6, 8, 10)),
        Row(182, "tome", total=0.25, at=LATE),
        *two_stage(keeps=(0.3, 0.2)),
        BOTH,
    )


def fewest() -> tuple[Row, ...]:
    """Return the rows that are compared in every setting."""
    return (
        BASE,
        Row(182),
        Row(154),
        *(Row(method=name, keep=0.5) for name in ("etps", "tome", "random")),
        Row(method="etps", keep=0.4, at=(6, 8, 10)),
        Row(182, "tome", total=0.25, at=LATE),
        Row(method="two-stage", keep=0.2, at=()),
        BOTH,
    )


BEFORE = ("pre-merge", "adaptive-patch")


def before_blocks(size: int = SIZE, smaller: tuple[int, ...] = SMALLER) -> tuple[Row, ...]:
    """Return rows that reduce before the first block, alone and followed by late merging."""
    rows = [Row(size), *map(Row, smaller)]
    for name in BEFORE:
        rows += [Row(size, name, keep=keep, at=(0,)) for keep in (0.9, 0.7, 0.5, 0.3)]
        for then in ("tome", "atc"):
            rows += [Row(size, then, total=total, at=LATE, first=(name, keep)) for keep, total in ((0.8, 0.5), (0.6, 0.5))]
    return (*rows, *(Row(size, "tome", total=total, at=LATE) for total in (0.5, 0.35, 0.25)), *two_stage(size))


EXPONENTS = (0.0, 0.5, 1.0)


def exponents() -> dict[Row, tuple[Row, ...]]:
    """Return rows with the usual exponent of sizes, and for each the same with every exponent."""
    usual = (*(Row(method="pre-merge", keep=keep, at=(0,)) for keep in (0.7, 0.5, 0.3)), *two_stage(keeps=(0.3, 0.2)))
    return {
        row: tuple(row if e == 0.5 else dataclasses.replace(row, options={"exponent": e}) for e in EXPONENTS) for row in usual
    }


LARGE = 518  # pixels a side that the backbone was trained at: 37 x 37 patches
LARGE_BASE, LARGE_SMALLER = Row(LARGE), (462, 420, 378, 336)


def large_input() -> tuple[Row, ...]:
    """Return rows at `LARGE` pixels, and smaller inputs."""
    return (
        LARGE_BASE,
        *map(Row, LARGE_SMALLER),
        *(Row(LARGE, name, keep=0.5) for name in ("etps", "bat", "topk", "tome", "random", "avg-pool")),
        *(Row(LARGE, name, keep=0.4, at=(6, 8, 10)) for name in ("etps", "bat")),
        *(Row(LARGE, "tome", total=total, at=LATE) for total in (0.5, 0.25)),
        *(Row(462, "tome", total=total, at=LATE) for total in (0.5, 0.25)),
    )
