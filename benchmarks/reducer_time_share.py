"""The share of a reduced forward's CPU time that its reducers take: scoring, matching, merging and recording."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laconic.analysis.break_even import stepping
from laconic.analysis.timing import TINY, cpu_clock
from laconic.core.token_reduction import reduction_of

RUNS = 12


def share(model: nn.Module, images: Tensor, runs: int = RUNS) -> float:
    """Return the CPU time of all reducer calls of a forward, each run again alone, divided by that of the forward.

    Each time is that of the fastest of several runs: other processes can only slow a run down.
    """
    calls = list[Callable[[], Any]]()

    def recorded(own: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(partial(own, *arguments))
        return own(*arguments)

    with torch.inference_mode():
        with stepping(reduction_of(model), recorded):
            model(images)
        # a phase with nothing to do returns its input, in no measurable time
        own_time = sum(least(call, runs) for call in calls)
        return own_time / max(least(lambda: model(images), runs), TINY)


def least(run: Callable[[], Any], runs: int) -> float:
    """Return the CPU time of the fastest of ``runs`` runs, in seconds."""
    return min(cpu_clock(run).cpu for _ in range(runs))
