"""What share of a reduced forward is the reducer's own: choosing, matching, merging, and keeping the books."""

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
    """CPU time of the moments of a reduced model's reducers, each run again alone, by that of its forward.

    Of each the least of several runs is taken: whatever else the machine does can only slow one down.
    """
    moments = list[Callable[[], Any]]()

    def noted(own: Callable[..., Any], *arguments: Any) -> Any:
        moments.append(partial(own, *arguments))
        return own(*arguments)

    with torch.inference_mode():
        with stepping(reduction_of(model), noted):
            model(images)
        # a moment without anything to do hands on what it got: that takes nothing
        own_time = sum(least(moment, runs) for moment in moments)
        return own_time / max(least(lambda: model(images), runs), TINY)


def least(run: Callable[[], Any], runs: int) -> float:
    """Seconds of CPU time of the quickest of so many runs."""
    return min(cpu_clock(run).cpu for _ in range(runs))
