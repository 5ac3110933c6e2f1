"""Compare rows: paired differences with intervals, and smaller inputs interpolated to equal measured time."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_model.measure import unpacked
from benchmarks.real_model.rows import BASE, SMALLER, Row
from laconic.core.files import json_lines

SHARES = ("hits", "category_hits", "probe_hits", "object_hits")  # one value per query, stored as bits
FEATURES = ("class_cosine", "patch_cosine", "map_correlation", "map_auc")  # one value for each of the first pictures
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its 95 % interval."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return abs(self.mean) > self.half


@dataclass(frozen=True)
class Results:
    """All measurements: ``lines[set][row]``, and ``speed[row]``, the quartiles of the speed-up in wall time.

    ``base`` is the unreduced model that speeds and features are compared with, ``smaller`` are its smaller inputs.
    """

    lines: Mapping[str, Mapping[str, dict[str, Any]]]
    speed: Mapping[str, tuple[float, float, float]]
    base: Row = BASE
    smaller: tuple[int, ...] = SMALLER

    @classmethod
    def read(cls, results: Path, speed: Path, base: Row = BASE, smaller: tuple[int, ...] = SMALLER) -> Results:
        """Read the files that the commands of this folder wrote."""
        lines: dict[str, dict[str, dict[str, Any]]] = {}
        for line in json_lines(results):
            lines.setdefault(line["set"], {})[line["row"]] = line
        timed = json.loads(speed.read_text()) if speed.is_file() else {}
        walls = {name: tuple(found["wall"]) for name, found in timed.get(base.key, {}).get("rows", {}).items()}
        return cls(lines, walls | {base.key: (1.0, 1.0, 1.0)}, base, smaller)

    def values(self, name: str, row: str, measure: str) -> Values | None:
        """Return a measure of every instance (mean over its queries) or picture; None if it was not measured.

        The unreduced model agrees with itself: its own features have cosine and correlation one.
        """
        line = self.lines.get(name, {}).get(row)
        if line is None:
            return None
        if measure in SHARES:
            if measure not in line:
                return None
            hits = unpacked(line[measure], line["queries"] * line["instances"])
            return hits.reshape(line["queries"], line["instances"]).mean(0)
        if measure not in line:
            return np.ones(len(line["map_auc"])) if row == self.base.key else None
        return np.array(line[measure], dtype=float)

    def mean(self, name: str, row: str, measure: str) -> Estimate | None:
        """Return the mean of a measure over instances or pictures."""
        found = self.values(name, row, measure)
        return None if found is None else estimate(found)

    def difference(self, name: str, row: str, other: str, measure: str) -> Estimate | None:
        """Return the mean paired difference of two rows."""
        one, two = self.values(name, row, measure), self.values(name, other, measure)
        return None if one is None or two is None else estimate(one - two)

    def over_smaller_input(self, name: str, row: str, measure: str) -> Estimate | None:
        """Return the mean paired difference to a smaller input that takes as long, by the measured speed.

        The smaller input is interpolated, in time, between the two sizes whose measured times are around the row's. None if the
        row is not between two measured sizes.
        """
        own, speed = self.values(name, row, measure), self.speed.get(row)
        if own is None or speed is None:
            return None
        inputs = [self.base.key, *(Row(size).key for size in self.smaller)]
        known = [
            (1 / self.speed[key][1], found)
            for key in inputs
            if key in self.speed and (found := self.values(name, key, measure)) is not None
        ]
        known.sort(key=lambda pair: pair[0])
        time = 1 / speed[1]
        for (fast, one), (slow, two) in itertools.pairwise(known):
            if fast <= time <= slow:
                share = (time - fast) / (slow - fast)
                return estimate(own - ((1 - share) * one + share * two))
        return None


def estimate(values: Values) -> Estimate:
    """Return the mean and the half width of its interval by the normal approximation; NaN are left out."""
    known = values[~np.isnan(values)]
    return Estimate(float(known.mean()), 1.96 * float(known.std(ddof=1)) / math.sqrt(len(known)))
