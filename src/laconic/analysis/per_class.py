"""The accuracy of every class, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laconic.analysis.accuracy import Answers
from laconic.analysis.intervals import wilson

OTHER = "(other)"  # the last column: an output of the model that is no class of the data, or logits that are not finite


@dataclass(frozen=True)
class ClassScore:
    """The accuracy of one class, as shares; None where there is nothing to divide by.

    ``top1`` is the share of the images of the class that got it (recall), ``precision`` the share of the images that got the
    class and are of it. ``taken_for`` is the class that its images get most often by mistake, and ``taken`` how many do.
    """

    name: str
    images: int
    top1: float | None
    interval: tuple[float, float] | None
    precision: float | None
    taken_for: str
    taken: int

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        return {**vars(self), "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix: ``counts`` [classes, classes + 1], true class by answer; the last answer is `OTHER`."""

    classes: tuple[str, ...]
    counts: Tensor

    @classmethod
    def of(cls, answers: Answers, classes: Sequence[str]) -> Confusion:
        """Count the first classes of all images that were read."""
        size = len(classes)
        labels, first = (answers.column(name)[answers.read].long() for name in ("label", "predicted"))
        first = torch.where((first >= 0) & (first < size), first, size)
        counts = (labels * (size + 1) + first).bincount(minlength=size * (size + 1))
        return cls(tuple(classes), counts.view(size, size + 1))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns; the last one only if it has a count."""
        return (*self.classes, OTHER) if int(self.counts[:, -1].sum()) else self.classes

    def rows(self) -> list[list[int]]:
        """Return the counts of the columns `names`, a row for every class."""
        rows: list[list[int]] = self.counts[:, : len(self.names)].tolist()
        return rows

    def scores(self) -> list[ClassScore]:
        """Return the accuracy of every class, in the order of the classes."""
        answered, out = self.counts.sum(0).tolist(), list[ClassScore]()
        for number, (name, row) in enumerate(zip(self.classes, self.counts.tolist(), strict=True)):
            images, right = sum(row), row[number]
            wrong = [0 if i == number else count for i, count in enumerate(row)]
            taken = max(wrong)
            whom = (*self.classes, OTHER)[wrong.index(taken)] if taken else ""
            share, interval = (right / images, wilson(right, images)) if images else (None, None)
            precision = right / answered[number] if answered[number] else None
            out.append(ClassScore(name, images, share, interval, precision, whom, taken))
        return out

    @property
    def balanced(self) -> float | None:
        """The balanced accuracy: the mean of the classes' top-1, over the classes with images; None without any."""
        shares = [score.top1 for score in self.scores() if score.top1 is not None]
        return sum(shares) / len(shares) if shares else None
