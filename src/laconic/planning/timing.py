"""Time measurements on this machine: reduced models and the unreduced one in turn, and the time of each block."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.analysis.break_even import quiet
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.stopwatch import Stopwatch, stopwatch
from laconic.analysis.timing import Quartiles, Sample, interleave, ratios
from laconic.api import reduce_
from laconic.core.backbone import find_host
from laconic.core.patching import apply_settings
from laconic.core.schedule import Schedule
from laconic.planning.progress import ticking
from laconic.planning.space import ScheduleSpace

BASE = "unreduced"
WARMUP = 2  # rounds before the measurement
LEAST, MOST, PATIENCE = 10, 100, 12.0  # fewest and most rounds; in between, as many as fit in this many seconds


@dataclass(frozen=True)
class Measuring:
    """Settings of time measurements: images per forward, rounds (None: as many as a few seconds allow), and stopwatch."""

    batch_size: int = 1
    rounds: int | None = None
    watch: Stopwatch | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def stopwatch(self, device: torch.device) -> Stopwatch:
        """Return the stopwatch for a device."""
        return self.watch or stopwatch(device)


@dataclass(frozen=True)
class Measured:
    """Measured speed-up of a reduced model over the unreduced one, and the seconds of a forward of each."""

    ratio: Quartiles
    seconds: Quartiles
    base_seconds: Quartiles
    batch_size: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        spans = {name: list(vars(getattr(self, name)).values()) for name in ("ratio", "seconds", "base_seconds")}
        return {**spans, "batch_size": self.batch_size, "rounds": self.rounds}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Measured:
        """Build a measurement from the output of `to_json`."""
        ratio, seconds, base = (Quartiles(*fields[name]) for name in ("ratio", "seconds", "base_seconds"))
        return cls(ratio, seconds, base, fields["batch_size"], fields["rounds"])


class Timed:
    """A model and a batch; each call runs one forward and records when each block began and ended."""

    def __init__(self, model: nn.Module, images: Tensor, watch: Stopwatch) -> None:
        self.host, entry = find_host(model)
        self.images = images
        self.watch, self.marks = watch, list[list[Any]]()
        for block in entry.blocks(self.host):
            block.register_forward_pre_hook(lambda *_: self.marks[-1].append(watch.mark()))
            block.register_forward_hook(lambda *_: self.marks[-1].append(watch.mark()))

    def __call__(self) -> None:
        """Run one forward."""
        self.marks.append([])
        self.host(self.images)

    def rows(self, skip: int) -> list[list[float]]:
        """Return the seconds of each block, for every forward after the first ``skip``."""
        return [[self.watch.between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)] for marks in self.marks[skip:]]


def reduced(space: ScheduleSpace, schedule: Schedule) -> nn.Module:
    """Return a copy of the model that shares its weights, reduced by a schedule."""
    example = None if space.example is None else space.example[:1]
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return reduce_(shared_copy(space.model), space.config, schedule=schedule, example=example)


@dataclass(frozen=True)
class Times:
    """Measured times of one model: whole forwards, and the seconds of each block in each forward."""

    samples: Sequence[Sample]
    blocks: Sequence[Sequence[float]]


def time_all(space: ScheduleSpace, schedules: Sequence[Schedule], measuring: Measuring) -> dict[str, Times]:
    """Time the unreduced model (key `BASE`) and one reduced model per schedule (key: its index as text), interleaved.

    All models run in evaluation mode.
    """
    device = next(space.host.parameters()).device
    watch = measuring.stopwatch(device)
    images = space.batch(measuring.batch_size)
    apply_settings(space.host, space.entry)  # the unreduced model too runs fused attention
    models = {BASE: shared_copy(space.model), **{str(i): reduced(space, schedule) for i, schedule in enumerate(schedules)}}
    runs = {name: Timed(model.eval(), images, watch) for name, model in models.items()}
    with torch.inference_mode():
        begin = time.perf_counter()
        interleave(runs, WARMUP, watch.time)
        spent = (time.perf_counter() - begin) / WARMUP
        skip = {name: len(run.marks) for name, run in runs.items()}
        rounds = measuring.rounds or min(MOST, max(LEAST, round(PATIENCE / max(spent, 1e-9))))
        forwards = rounds * len(interleave(dict.fromkeys(runs, _nothing), 1, watch.time)[BASE]) + rounds * len(schedules)
        with ticking(forwards, "measuring", "forward") as tick:
            samples = interleave(runs, rounds, watch.time, tick)
    return {name: Times(samples[name], run.rows(skip[name])) for name, run in runs.items()}


def _nothing() -> None:
    pass


def measure(space: ScheduleSpace, schedules: Sequence[Schedule], measuring: Measuring) -> list[Measured]:
    """Time reduced models against the unreduced one, interleaved in one process."""
    times = time_all(space, schedules, measuring)
    base = Quartiles.of([sample.own.wall for sample in times[BASE].samples])
    out = []
    for number in range(len(schedules)):
        own = times[str(number)].samples
        seconds = Quartiles.of([sample.own.wall for sample in own])
        out.append(Measured(ratios(own)[0], seconds, base, measuring.batch_size, len(own)))
    return out
