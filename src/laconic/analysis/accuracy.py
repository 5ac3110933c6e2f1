"""Results of an evaluation: the numbers of every image, and the accuracy over all images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from laconic.analysis.intervals import wilson
from laconic.data import Unreadable, count_read

COLUMNS = ("read", "top1", "top5", "loss", "finite", "agrees", "divergence", "label", "predicted", "failed")


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation; ``total`` is an all-reduce that sums a tensor over them."""

    rank: int = 0
    world: int = 1
    total: Callable[[Tensor], Tensor] = field(default=lambda table: table)


ALONE = Processes()


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over the images that could be read, as shares from 0 to 1.

    ``interval`` is the 95 % interval of top1 (Wilson). ``agreement`` (the share of images whose top class is that of the
    reference) and ``divergence`` (mean KL(reference || model), nats) are None without a reference. Images whose logits are
    not finite (``not_finite`` of them) count as wrong and make the loss NaN.
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
        """The number of images that were read, and the reasons for the others."""
        return count_read(self.images + len(self.unreadable), self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON; unknown and non-finite numbers are null."""
        numbers = {name: getattr(self, name) for name in ("top1", "top5", "loss", "agreement", "divergence")}
        shares = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
        failures = [{"name": error.name, "reason": error.reason} for error in self.unreadable]
        counts = {"images": self.images, "not_finite": self.not_finite, "unreadable": failures}
        return {**counts, **shares, "interval": list(self.interval)}


@dataclass(frozen=True)
class Answers:
    """The outputs of a model per image: ``table`` [N, COLUMNS] for all images, ``logits`` for this process's images.

    In the table, ``predicted`` is the number of the top class, and -1 where logits are not finite.
    """

    table: Tensor
    rows: Tensor  # [n], image numbers of this process
    logits: Tensor | None  # [n, classes], None unless keep_logits was set
    unreadable: tuple[Unreadable, ...]
    compared: bool

    def column(self, name: str) -> Tensor:
        """Return one column of the table, [N]; it is 0 for images that were not read."""
        return self.table[:, COLUMNS.index(name)]

    @property
    def read(self) -> Tensor:
        """Mask of the images that were read, [N] of bool."""
        return self.column("read") > 0

    @property
    def correct(self) -> Tensor:
        """Mask of the images whose top class was right, [N] of bool."""
        return self.column("top1") > 0

    @cached_property
    def place(self) -> dict[int, int]:
        """The row of ``logits`` for each image number."""
        return {int(row): place for place, row in enumerate(self.rows)}

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy over all images that were read.

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
