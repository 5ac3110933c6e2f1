"""Stopwatches for forwards: by the wall clock, or on CUDA by events on the device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Time:
    """Seconds of one forward: wall time (on CUDA: device time), and CPU time summed over all threads."""

    wall: float
    cpu: float


class Stopwatch(ABC):
    """Mark points in a run, and measure the seconds between two marks."""

    @abstractmethod
    def mark(self) -> Any:
        """Return a mark for the present point of the run."""

    @abstractmethod
    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""

    def time(self, run: Run) -> Time:
        """Time a whole run; its CPU time is not measured and set to the wall time."""
        begin = self.mark()
        run()
        wall = self.between(begin, self.mark())
        return Time(wall, wall)


class WallStopwatch(Stopwatch):
    """Measure wall time."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        return end - begin


class CudaStopwatch(Stopwatch):
    """Measure device time with CUDA events."""

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def stopwatch(device: torch.device) -> Stopwatch:
    """Return the stopwatch for a device."""
    return CudaStopwatch() if device.type == "cuda" else WallStopwatch()
