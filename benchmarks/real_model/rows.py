"""The rows of the evidence: an input size and a way to reduce the tokens of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

import laconic
from laconic.core.method import METHODS
from laconic.core.schedule import Schedule

PATCH, SIZE = 14, 224
SITES = (3, 6, 9)  # a quarter, a half and three quarters of the depth, where the papers reduce
KEEPS = (0.9, 0.7, 0.5, 0.3)
SMALLER = (210, 196, 182, 168, 154, 140, 126, 112)
EXCLUDED = ("avit", "evovit", "heuristic")  # halts in the last block; needs its training; keeps the middle of the picture


@dataclass(frozen=True)
class Row:
    """A row: ``size`` pixels a side, and a method with its settings ("" for the unreduced model).

    ``keep`` and ``at`` are the keep rate of each reducing block and these blocks. If ``total`` is set, tokens are removed in
    equal steps at the blocks ``at`` until this share of the patches is left.
    """

    size: int = SIZE
    method: str = ""
    keep: float | None = None
    at: tuple[int, ...] = SITES
    total: float | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """A unique name."""
        if not self.method:
            return f"input {self.size}"
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        blocks = " ".join(map(str, self.at))
        share = f"keep {self.keep:g}" if self.total is None else f"to {self.total:.0%}"
        place = f"{self.size} px, " if self.size != SIZE else ""
        return f"{place}{self.method}{options} {share} at {blocks}"

    @property
    def plain(self) -> bool:
        """True for the unreduced model, at any input size."""
        return not self.method

    def schedule(self) -> Schedule:
        """Return the schedule of a row with a method."""
        if self.total is None:
            if METHODS[self.method].count == "variable":
                return Schedule.adaptive(self.at)
            return Schedule.rates(self.keep or 1.0, self.at)
        patches = (self.size // PATCH) ** 2
        step = patches * (1 - self.total) / len(self.at)
        return Schedule.keep_counts({block: round(patches - step * n) for n, block in enumerate(self.at, 1)})

    def apply(self, model: nn.Module, *, restore: bool = False) -> nn.Module:
        """Reduce ``model``, which was loaded at this row's size, in place."""
        if self.plain:
            return model
        return laconic.reduce_(model, self.method, schedule=self.schedule(), restore=restore, **self.options)


BASE = Row()


def every_method() -> tuple[Row, ...]:
    """Return all methods that need no training, at the papers' blocks and keep rates, and smaller inputs."""
    names = [name for name, method in METHODS.items() if not method.learns and name not in EXCLUDED]
    rows = [BASE, *(Row(size) for size in SMALLER)]
    for keep in (0.5, 0.7, 0.3, 0.9):
        for name in names:
            if METHODS[name].count == "variable":
                continue
            rows.append(Row(method=name, keep=keep))
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
    for method in ("etps", "bat", "evit", "topk", "tome", "random"):
        rows += [Row(method=method, keep=0.4, at=(6, 8, 10)), Row(method=method, keep=0.3, at=(8, 10))]
    for method in ("etps", "bat"):
        rows += [
            Row(method=method, keep=0.35, at=(5, 7, 9)),
            Row(method=method, keep=0.4, at=(4, 6, 8)),
            Row(method=method, keep=0.2, at=(9,)),
            Row(182, method, keep=0.4, at=(6, 8, 10)),
            Row(182, method, keep=0.3, at=(8, 10)),
            Row(168, method, keep=0.4, at=(6, 8, 10)),
        ]
    return tuple(rows)


def characters() -> tuple[Row, ...]:
    """Return the rows that are compared on many pictures and settings."""
    return (
        BASE,
        Row(196),
        Row(182),
        Row(168),
        Row(154),
        *(Row(method=name, keep=0.5) for name in ("etps", "bat", "evit", "topk", "atc", "tome", "random", "avg-pool")),
        *(Row(method=name, keep=0.7) for name in ("etps", "bat", "tome")),
        *(Row(method=name, keep=0.4, at=(6, 8, 10)) for name in ("etps", "bat", "topk", "tome", "random")),
        Row(method="etps", keep=0.3, at=(8, 10)),
        Row(182, "etps", keep=0.4, at=(6, 8, 10)),
        Row(182, "bat", keep=0.4, at=(6, 8, 10)),
        Row(method="tome", total=0.25, at=LATE),
        Row(182, "tome", total=0.25, at=LATE),
    )


def few() -> tuple[Row, ...]:
    """Return the rows that are compared in every setting."""
    return (
        BASE,
        Row(182),
        Row(154),
        *(Row(method=name, keep=0.5) for name in ("etps", "bat", "evit", "tome", "atc", "random")),
        *(Row(method=name, keep=0.4, at=(6, 8, 10)) for name in ("etps", "bat", "random")),
        Row(182, "etps", keep=0.4, at=(6, 8, 10)),
        Row(182, "tome", total=0.25, at=LATE),
    )
