"""The keep-rate warm-in over the steps of a run."""

from __future__ import annotations

from laconic.compression import Compression
from laconic.recipe import MethodPart
from laconic.schedule import WarmIn


class KeepRate:
    """Sets the schedule of reduced models, step by step, from no reduction to the recipe's; without a warm-in it is constant.

    Args:
        compressions: of the model and of its moving average.
        method: says when the warm-in starts, and how long it is, in epochs.
        steps: in an epoch.
    """

    def __init__(self, compressions: list[Compression], method: MethodPart, steps: int) -> None:
        self.compressions = compressions if method.warms_in else []
        self.final = [compression.schedule for compression in self.compressions]
        start, end = round(method.warm_in_start * steps), round((method.warm_in_start + method.warm_in_epochs) * steps)
        self.warm = WarmIn(start, end - start)

    def set(self, step: int) -> None:
        """The schedule of a step (from 0)."""
        for compression, final in zip(self.compressions, self.final, strict=True):
            compression.set_schedule(self.warm(final, step))

    def arrived(self, step: int) -> bool:
        """Whether the schedule of that step is the recipe's."""
        return not self.compressions or step >= self.warm.start + self.warm.length

    def finish(self) -> None:
        """The recipe's schedule, whatever the step."""
        for compression, final in zip(self.compressions, self.final, strict=True):
            compression.set_schedule(final)
