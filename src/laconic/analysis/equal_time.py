"""Compare a row with a smaller input that takes as long: the input size is interpolated to equal measured time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED = 4000, 0  # of the bootstrap
Values = NDArray[np.float64]  # of a measure, one for each photograph


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name, rounded to four digits."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def bootstrap(values: Values) -> Interval:
    """Return the mean over the values and its 95 % interval, by resampling the values (seeded)."""
    draws = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def at_equal_time(inputs: Sequence[tuple[float, Values]], seconds: float) -> Values | None:
    """Return the values of an input size that takes ``seconds``, linear in time between the two measured sizes around it.

    Args:
        inputs: measured time and values of each input size, the full size among them; in any order.
        seconds: time of the row to compare with, measured as those were.

    Returns:
        The values, or None if the time is shorter than every size's or longer than every size's.
    """
    for (fast, one), (slow, two) in itertools.pairwise(sorted(inputs, key=lambda pair: pair[0])):
        if fast <= seconds <= slow:
            share = (seconds - fast) / (slow - fast) if slow > fast else 0.0
            return (1 - share) * one + share * two
    return None


def over_smaller_input(own: Values, inputs: Sequence[tuple[float, Values]], seconds: float) -> Interval | None:
    """Return the mean paired difference of a row to a smaller input of equal time, with its interval; None as above."""
    other = at_equal_time(inputs, seconds)
    return None if other is None else bootstrap(own - other)
