"""Time variants in one process, interleaved round by round, as ratios to the unreduced model.

Absolute times depend on the machine and its load; the ratio of two consecutive forwards hardly does. So a round runs every
variant once, with a run of the unreduced model after every few variants. The ratio of a variant is the mean time of the
unreduced runs before and after it, divided by its own time. Every other round runs in reverse order. The results are the
median and the quartiles of the ratios over all rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.analysis.stopwatch import Run as Run
from laconic.analysis.stopwatch import Time as Time

APART = 4  # variants between two runs of the unreduced model
TINY = 1e-12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """The settings of a measurement.

    Args:
        rounds: number of rounds; each runs every variant once, and the unreduced model before and after every few of them.
        threads: CPU threads (default: torch's default).
        compile: use torch.compile for all models, the unreduced one included.
        device: ``auto`` uses cuda if available, else cpu.
        dtype: dtype of weights and images.
    """

    rounds: int = 10
    threads: int | None = None
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device; use --device cpu, or install a build of torch with CUDA")

    @property
    def place(self) -> torch.device:
        """The device to measure on."""
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")


@dataclass(frozen=True)
class Quartiles:
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Sample:
    """The time of one forward, and the mean time of the unreduced forwards before and after it."""

    own: Time
    base: Time


Clock = Callable[[Run], Time]


def cpu_clock(run: Run) -> Time:
    """Time one run on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Time(time.perf_counter() - wall, time.process_time() - cpu)


def cuda_clock(run: Run) -> Time:
    """Time one run on the GPU with events; the CPU time is that of launching the work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    run()
    end.record()
    cpu = time.process_time() - cpu
    end.synchronize()
    return Time(begin.elapsed_time(end) / 1e3, cpu)


def interleave(runs: Mapping[str, Run], rounds: int, clock: Clock, tick: Run = lambda: None) -> dict[str, list[Sample]]:
    """Run each once a round, in reverse order every other round, and the first (the base) again after every `APART` others."""
    base, *others = runs
    samples: dict[str, list[Sample]] = {name: [] for name in runs}

    def once(name: str) -> Time:
        took = clock(runs[name])
        tick()
        return took

    for number in range(rounds):
        order = others[::-1] if number % 2 else others
        before = once(base)
        samples[base].append(Sample(before, before))
        for start in range(0, len(order), APART):
            group = [(name, once(name)) for name in order[start : start + APART]]
            after = once(base)
            around = Time((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2)
            for name, took in group:
                samples[name].append(Sample(took, around))
            samples[base].append(Sample(after, after))
            before = after
    return samples


def ratios(samples: Sequence[Sample]) -> tuple[Quartiles, Quartiles]:
    """Return the speedup over the base in wall time and in CPU time, as quartiles over the rounds."""
    wall = [s.base.wall / max(s.own.wall, TINY) for s in samples]
    return Quartiles.of(wall), Quartiles.of([s.base.cpu / max(s.own.cpu, TINY) for s in samples])


def forward(model: Any, images: Tensor, *, compiled: bool) -> Run:
    """Return a function that runs one forward."""

    def call(images: Tensor) -> Any:
        return model(images)

    # torch.compile caches eight graphs per code object and then silently runs uncompiled: so every model gets its own code
    # object, and every batch size its own graph
    call.__code__ = call.__code__.replace()
    run = torch.compile(call, dynamic=False) if compiled else call
    return lambda: run(images)


def time_models(models: Mapping[str, tuple[Any, Tensor]], setting: Setting, warmup: int = 2) -> dict[str, list[Sample]]:
    """Time one forward of each (model, images) in every round, after ``warmup`` rounds that are discarded."""
    runs = {name: forward(model, images, compiled=setting.compile) for name, (model, images) in models.items()}
    return time_runs(runs, setting, warmup)


def time_runs(runs: Mapping[str, Run], setting: Setting, warmup: int = 2) -> dict[str, list[Sample]]:
    """Time each run once in every round, after ``warmup`` rounds that are discarded."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    clock = cuda_clock if setting.place.type == "cuda" else cpu_clock
    steps = (warmup + setting.rounds) * (len(runs) + math.ceil((len(runs) - 1) / APART))
    with torch.inference_mode(), tqdm(total=steps, desc="measuring", unit="forward", leave=False, disable=None) as bar:
        interleave(runs, warmup, clock, bar.update)
        return interleave(runs, setting.rounds, clock, bar.update)
