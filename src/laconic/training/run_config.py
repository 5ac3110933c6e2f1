"""The configuration of a run: model, images, recipe, and execution settings."""

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
    """Execution settings of a run, which are not part of its recipe.

    Stopping and resuming a run does not change its results. Another number of processes or micro-batches changes only
    rounding, the random numbers inside a step (Gumbel, drop path, mixup) and the batches of batch norm.

    Args:
        accumulate: number of micro-batches that one step's batch is split into.
        workers: processes that read images, for each training process.
        checkpoint_every: steps between checkpoints (0: only at the end of each epoch).
        eval_every: epochs between validations.
        log_every: steps between rows of metrics.
        device: auto (the device that accelerate finds) or cpu.
        trackers: names of installed trackers that accelerate supports: trackio, tensorboard, wandb ...
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
                f"--device must be auto or cpu, not {self.device!r}; select accelerators with the launcher or with "
                "CUDA_VISIBLE_DEVICES"
            )


@dataclass
class Run:
    """A prepared run: all inputs of the training loop; ``data`` are the facts on the images, which resuming compares."""

    recipe: Recipe
    model: nn.Module
    teacher: nn.Module | None
    train: ImageSet
    val: ImageSet | None
    train_transform: Callable[[Any], Tensor]
    output: Path
    running: Running = Running()
    unreadable: set[str] = field(default_factory=set)
    data: dict[str, Any] = field(default_factory=dict)
