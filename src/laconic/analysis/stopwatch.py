"""Clocks for forwards: by the wall clock, or on CUDA by events on the device."""

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
    """Seconds of one forward: by the clock (on CUDA: of the device), and of all CPU threads together."""

    wall: float
    cpu: float


class Stopwatch(ABC):
    """Marks points of a run, and tells the seconds between two of them."""

    @abstractmethod
    def mark(self) -> Any:
        """Now."""

    @abstractmethod
    def between(self, begin: Any, end: Any) -> float:
        """Seconds."""

    def time(self, run: Run) -> Time:
        """Time a whole run."""
        begin = self.mark()
        run()
        wall = self.between(begin, self.mark())
        return Time(wall, wall)


class WallStopwatch(Stopwatch):
    """By the clock on the wall."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        return end - begin


class CudaStopwatch(Stopwatch):
    """By events on the device."""

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
