"""Confidence intervals of shares."""

from __future__ import annotations

import math

NORMAL = 1.959964  # the normal quantile of a 95 % interval


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson (1927). It stays within 0 and 1 even if all or none are right."""
    share, square = right / total, NORMAL**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = NORMAL * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)
