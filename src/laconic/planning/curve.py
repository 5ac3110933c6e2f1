"""Least-squares fits to a few noisy points: a non-decreasing curve, and a linear model with non-negative weights."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Curve:
    """Piecewise linear curve through points of ascending ``x``; extrapolated linearly at both ends, never below zero."""

    x: tuple[float | int, ...]
    y: tuple[float, ...]

    @classmethod
    def through(cls, points: Mapping[float | int, tuple[float, float]]) -> Curve:
        """Fit a non-decreasing curve to points, x -> (y, weight), by weighted least squares (isotonic regression)."""
        pools = list[tuple[float, float, int]]()  # mean, weight, number of points: decreasing neighbours are pooled
        for _, (y, weight) in sorted(points.items()):
            pools.append((y, weight, 1))
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (a, wa, na), (b, wb, nb) = pools[-2:]
                pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
        return cls(tuple(sorted(points)), tuple(mean for mean, _, count in pools for _ in range(count)))

    def __call__(self, x: float | int) -> float:
        """Return y at ``x``."""
        if len(self.x) == 1:
            return self.y[0]
        right = min(max(1, bisect.bisect_left(self.x, x)), len(self.x) - 1)
        (x0, x1), (y0, y1) = self.x[right - 1 : right + 1], self.y[right - 1 : right + 1]
        return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def not_negative(rows: Sequence[Sequence[float | int]], values: Sequence[float | int], width: int) -> tuple[float, ...]:
    """Return non-negative least-squares weights of the columns, by trying every subset of columns."""
    best, least = (0.0,) * width, float("inf")
    matrix, wanted = torch.tensor(rows, dtype=torch.float64).reshape(-1, width), torch.tensor(values, dtype=torch.float64)
    for size in range(width + 1):
        for chosen in itertools.combinations(range(width), size):
            weights = torch.zeros(width, dtype=torch.float64)
            if chosen:
                columns = matrix[:, list(chosen)]
                weights[list(chosen)] = torch.linalg.lstsq(columns, wanted[:, None], driver="gelsd").solution[:, 0]
            error = float((matrix @ weights - wanted).square().sum())
            if float(weights.min()) >= 0 and error < least:
                best, least = tuple(weights.tolist()), error
    return best
