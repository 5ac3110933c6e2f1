"""The micro-batches of each training step; they depend only on the step, not on what was read before."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader

from laconic.analysis.evaluate import config_for
from laconic.data import Order, Prepared
from laconic.data.workers import batches as read_batches
from laconic.data.workers import begin, check_shared_memory
from laconic.training.balance import draw_weights
from laconic.training.run_config import Run
from laconic.training.token_labels import patch_labels

LOG = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor, Tensor | None]  # images, class indices, and the classes of their patches


class Batches:
    """The training images of a run, for one process.

    Args:
        run: the run: its images, their augmentation and the batch size.
        rank: index of this process.
        world: number of processes.
        pinned: use pinned memory, for faster transfer to a GPU.
        grid: rows and columns of patches, if the classes of patches are needed.

    Raises:
        ValueError: the batch cannot be divided evenly, or there are fewer images than one batch.
    """

    def __init__(self, run: Run, rank: int, world: int, *, pinned: bool = False, grid: tuple[int, int] | None = None) -> None:
        self.run, self.rank, self.world, self.pinned, self.grid = run, rank, world, pinned, grid
        self.draw = draw_weights(run.train, run.recipe.data.sampler)
        self.steps = self._order(0, 0).steps
        share = run.recipe.optimization.batch_size // (world * run.running.accumulate)
        check_shared_memory(run.running.workers, 4 * share * math.prod(config_for(run.model)["input_size"]))

    def _order(self, epoch: int, start: int) -> Order:
        recipe = self.run.recipe
        return Order(
            len(self.run.train),
            recipe.optimization.batch_size,
            seed=recipe.seed,
            epoch=epoch,
            rank=self.rank,
            world=self.world,
            accumulate=self.run.running.accumulate,
            repeats=recipe.augmentation.repeats,
            start=start,
            draw=self.draw,
        )

    def of_steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, from step ``start`` of an epoch to its end."""
        images = Prepared(self.run.train, self.run.train_transform, seed=self.run.recipe.seed)
        order, workers = self._order(epoch, start), self.run.running.workers
        loader = DataLoader(images, batch_sampler=order, num_workers=workers, pin_memory=self.pinned, worker_init_fn=begin)
        batches = list[Batch]()
        for pixels, labels, index, failed in read_batches(loader):
            for number in failed[failed >= 0].tolist():
                self._unreadable(number)
            patches = None if self.grid is None else patch_labels(self.run.train, index.tolist(), self.grid)
            batches.append((pixels, labels, patches))
            if len(batches) == self.run.running.accumulate:
                yield batches
                batches = []

    def _unreadable(self, index: int) -> None:
        name = self.run.train.name(index)
        if name not in self.run.unreadable:
            self.run.unreadable.add(name)
            LOG.warning("%s cannot be read; the next image replaces it in every epoch", name)
