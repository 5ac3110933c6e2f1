"""A run, prepared: what is trained on what, by which recipe, and how it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from laconic.data import ImageSet
from laconic.training.recipe import Recipe


@dataclass(frozen=True)
class Running:
    """How a run is carried out.

    A stop and a resume change nothing at all. Another number of processes or micro-batches changes rounding, the noise of
    what is random inside a step (Gumbel, drop path, mixup) and the batches of batch norm, and nothing else.

    Args:
        accumulate: micro-batches that one step's batch is split into.
        workers: processes that read images, for each training process.
        checkpoint_every: steps between checkpoints (0: one at the end of each epoch).
        eval_every: epochs between validations.
        log_every: steps between rows of metrics.
        device: where to train: what accelerate finds, or the CPU.
        trackers: trackio, tensorboard, wandb: what accelerate knows by name and is installed.
    """

    accumulate: int = 1
    workers: int = 0
    checkpoint_every: int = 0
    eval_every: int = 1
    log_every: int = 10
    device: Literal["auto", "cpu"] = "auto"
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"accumulate": 1, "workers": 0, "checkpoint_every": 0, "eval_every": 1, "log_every": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {number}, not {getattr(self, name)}")
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f"--device must be auto or cpu, not {self.device!r}; which accelerators are seen is up to the launcher, or "
                "CUDA_VISIBLE_DEVICES"
            )


@dataclass
class Run:
    """A run that is prepared: everything the loop needs."""

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None
    train: ImageSet
    val: ImageSet | None
    train_transform: Callable[[Any], Tensor]
    output: Path
    running: Running = Running()
    unreadable: set[str] = field(default_factory=set)
