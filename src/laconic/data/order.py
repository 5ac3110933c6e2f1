"""`Order`: the images of every step, the same for any number of processes, and resumable at any step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler, WeightedRandomSampler

from laconic.data.prepared import Key


class Order(Sampler[list[Key]]):
    """A batch sampler: lists of ``(epoch, copy, index)``, one for each forward of this process.

    A step takes ``batch_size`` images of a permutation that seed and epoch determine. They are split into ``accumulate``
    forwards, and each forward into equal parts for the processes, so that a step, and each forward of it, has the same images
    for any number of processes. Images after the last whole step are skipped. ``epoch`` and ``start`` can be set between
    epochs (`begin`), which also works for loaders with persistent workers.

    Args:
        length: images in the set.
        batch_size: images in a step, over all processes and forwards.
        seed: seed of the permutations.
        epoch: the epoch, from 0.
        rank: rank of this process.
        world: number of processes.
        accumulate: forwards in a step.
        repeats: number of consecutive copies of an image, numbered 0, 1, ... (repeated augmentation). As in DeiT, an epoch
            still has ``length // batch_size`` steps, so it sees ``repeats`` times fewer images.
        start: steps of the first epoch to skip.
        draw: weights with which the images are drawn, with replacement; without them, every image comes once.

    Raises:
        ValueError: the batch cannot be divided evenly, there are fewer images than one batch, or a number is out of range.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        repeats: int = 1,
        start: int = 0,
        draw: Tensor | None = None,
    ) -> None:
        least = {"batch_size": batch_size, "world": world, "accumulate": accumulate, "repeats": repeats}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to {world - 1} of {world} processes, not {rank}")
        if batch_size % (world * accumulate):
            raise ValueError(
                f"a batch of {batch_size} images cannot be divided evenly by {world} processes x {accumulate} forwards = "
                f"{world * accumulate}; use a multiple of {world * accumulate}"
            )
        if length < batch_size:
            raise ValueError(f"{length} images do not fill one batch of {batch_size}; use a batch of at most {length}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.accumulate, self.repeats = rank, world, accumulate, repeats
        self.draw = draw
        self.begin(epoch, start)

    @property
    def steps(self) -> int:
        """The number of steps in a whole epoch."""
        return self.length // self.batch_size

    def begin(self, epoch: int, start: int = 0) -> None:
        """Continue with this epoch after its first ``start`` steps.

        Raises:
            ValueError: a number is negative, or ``start`` is more than the steps of an epoch.
        """
        if epoch < 0 or not 0 <= start <= self.steps:
            raise ValueError(f"epoch must be at least 0 and start 0 to {self.steps} steps; got epoch {epoch}, start {start}")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, word = self.epoch, np.random.SeedSequence([self.seed % 2**64, self.epoch]).generate_state(1)
        order = self._order(torch.Generator().manual_seed(int(word[0])))
        share = self.batch_size // (self.world * self.accumulate)
        for step in range(self.start, self.steps):
            for forward in range(self.accumulate):
                first = step * self.batch_size + (forward * self.world + self.rank) * share
                places = range(first, first + share)
                yield [(epoch, place % self.repeats, int(order[place // self.repeats])) for place in places]

    def _order(self, generator: torch.Generator) -> NDArray[np.int64]:
        """Return the numbers of the images of an epoch."""
        if self.draw is None:
            return torch.randperm(self.length, generator=generator).numpy()
        return np.fromiter(WeightedRandomSampler(self.draw, self.length, generator=generator), np.int64)  # type: ignore[arg-type]
