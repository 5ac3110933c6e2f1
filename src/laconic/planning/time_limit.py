"""The time that a run of `laconic.tune` may take, and how many images are affordable in it."""

from __future__ import annotations

import math
import time

LEAST = 4  # images on which a candidate is scored, however short the time


class TimeLimit:
    """A limit on the time from its creation on; ``minutes`` None: no limit.

    ``reserved`` are seconds that are kept for later. ``each`` is a first estimate of the seconds that scoring an image takes,
    until `spend` says better.
    """

    def __init__(self, minutes: float | None, reserved: float = 0.0) -> None:
        self.begin, self.minutes, self.reserved, self.first_each = time.monotonic(), minutes, reserved, 0.0
        self.seconds, self.images = 0.0, 0

    def spend(self, seconds: float, images: int) -> None:
        """Record the time that scoring these images took."""
        self.seconds, self.images = self.seconds + seconds, self.images + images

    @property
    def each(self) -> float:
        """The seconds that scoring an image takes."""
        return max(self.seconds / self.images if self.images else self.first_each, 1e-9)

    def left(self) -> float | None:
        """Return the seconds that are left, less those reserved; None if there is no limit."""
        return None if self.minutes is None else max(0.0, 60 * self.minutes - self.reserved - (time.monotonic() - self.begin))

    def deadline(self, share: float) -> float:
        """Return the time (`time.monotonic`) at which a share of the time left is over."""
        left = self.left()
        return math.inf if left is None else time.monotonic() + share * left

    def affordable(self, runs: int, wanted: int, share: float) -> int:
        """Return on how many images each of these runs may be: ``wanted``, or what a share of the time left is enough for."""
        left = self.left()
        if left is None:
            return wanted
        return max(LEAST, min(wanted, int(share * left / max(runs, 1) / self.each)))
