"""Results of an evaluation: the numbers of every image, and the accuracy they add up to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from laconic.analysis.intervals import wilson
from laconic.data import Unreadable, count_read

COLUMNS = ("read", "top1", "top5", "loss", "finite", "agrees", "divergence", "failed")


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation: ``total`` sums a tensor over all of them, and each gets the sum."""

    rank: int = 0
    world: int = 1
    total: Callable[[Tensor], Tensor] = field(default=lambda table: table)


ALONE = Processes()


@dataclass(frozen=True)
class Accuracy:
    """How good the answers were, as shares from 0 to 1, over the images that could be read.

    ``interval`` is the 95 % interval of top1 (Wilson). ``agreement`` (the share of images with the reference's first class)
    and ``divergence`` (mean KL(reference || model), nats) are None without a reference. Answers that are not finite count
    as wrong, and make the loss NaN.
    """

    images: int
    top1: float
    top5: float
    interval: tuple[float, float]
    loss: float
    agreement: float | None = None
    divergence: float | None = None
    not_finite: int = 0
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def line(self) -> str:
        """How many images were read, and why not the others."""
        return count_read(self.images + len(self.unreadable), self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """All of it, as plain JSON; null for what is not known or not finite."""
        numbers = {name: getattr(self, name) for name in ("top1", "top5", "loss", "agreement", "divergence")}
        shares = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
        failures = [{"name": error.name, "reason": error.reason} for error in self.unreadable]
        counts = {"images": self.images, "not_finite": self.not_finite, "unreadable": failures}
        return {**counts, **shares, "interval": list(self.interval)}


@dataclass(frozen=True)
class Answers:
    """What a model answered, image by image; ``table [N, COLUMNS]`` is of all images, ``logits`` are of this process's."""

    table: Tensor
    rows: Tensor  # [n], the numbers of this process's images
    logits: Tensor | None  # [n, classes], if they were to be kept
    unreadable: tuple[Unreadable, ...]
    compared: bool

    def column(self, name: str) -> Tensor:
        """One number for every image, [N], 0 where it was not read."""
        return self.table[:, COLUMNS.index(name)]

    @property
    def read(self) -> Tensor:
        """Which images were read, [N] of bool."""
        return self.column("read") > 0

    @property
    def correct(self) -> Tensor:
        """For which images the first answer was right, [N] of bool."""
        return self.column("top1") > 0

    @cached_property
    def place(self) -> dict[int, int]:
        """Where in ``logits`` the answer for an image is."""
        return {int(row): place for place, row in enumerate(self.rows)}

    @property
    def accuracy(self) -> Accuracy:
        """All in all.

        Raises:
            ValueError: no image could be read.
        """
        read = self.table[self.read]
        if not len(read):
            first = f"; the first is {self.unreadable[0]}" if self.unreadable else ""
            raise ValueError(f"none of {len(self.table)} images could be read{first}")
        means = dict(zip(COLUMNS, read.mean(0).tolist(), strict=True))
        right, bad = int(self.correct.sum()), int((read[:, COLUMNS.index("finite")] == 0).sum())
        agreement, divergence = (means["agrees"], means["divergence"]) if self.compared else (None, None)
        shares = (means["top1"], means["top5"], wilson(right, len(read)), means["loss"])
        return Accuracy(len(read), *shares, agreement, divergence, bad, self.unreadable)
