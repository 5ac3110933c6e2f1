"""Means and intervals over seeds and images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # 97.5 %


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95 % interval; in percentage points for shares."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}"

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return abs(self.mean) > self.half


def accuracy(runs: Sequence[Sequence[float | int]]) -> Estimate:
    """Return the mean accuracy, in per cent, of runs (one per seed) on the same images."""
    return _estimate([[float(hit) for hit in run] for run in runs])


def difference(runs: Sequence[Sequence[float | int]], others: Sequence[Sequence[float | int]]) -> Estimate:
    """Return the mean difference of accuracy, paired by image and seed, in percentage points."""
    return _estimate([[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(runs, others, strict=True)])


def _estimate(runs: Sequence[Sequence[float | int]]) -> Estimate:
    """Add the variances over seeds (means of runs) and over images (means over runs)."""
    images = [statistics.fmean(values) for values in zip(*runs, strict=True)]
    of_images = statistics.variance(images) / len(images)
    if len(runs) == 1:
        return Estimate(100 * statistics.fmean(images), 196 * math.sqrt(of_images))
    of_seeds = statistics.variance([statistics.fmean(run) for run in runs]) / len(runs)
    half = math.hypot(1.96 * math.sqrt(of_images), STUDENT.get(len(runs) - 1, 1.96) * math.sqrt(of_seeds))
    return Estimate(100 * statistics.fmean(images), 100 * half)
