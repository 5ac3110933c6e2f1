"""`Prepared`: images after a model's transform, each with its own random numbers.

The random numbers of an item depend only on the seed, the epoch, the image and its copy: not on the number of workers or
processes, and not on the items read before. So a run can be resumed at any step and on any machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from laconic.data.pictures import ImageSet
from laconic.data.sizes import Unreadable, check_resize

Key = tuple[int, int, int]  # epoch, copy, index
Item = tuple[Tensor, int, int, int]
PATIENCE = 100  # consecutive unreadable images before reading fails


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) inside the context, and restore their state afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(4)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))
    torch.default_generator.manual_seed(int(words[3]))  # torch.manual_seed would seed the accelerators too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Prepared(Dataset[Item]):
    """Images after a transform: ``(tensor, label, index, failed)``. ``failed`` is -1, or the number of an unreadable image.

    The key of an item is ``(epoch, copy, index)``, as `Order` yields it, or a plain index (epoch 0, copy 0). In training an
    unreadable image is replaced by the next readable one, and ``index`` and ``label`` are those of the replacement. With
    ``replace=False``, for evaluation, they are those of the unreadable image, and the evaluation must skip the item.

    Args:
        images: the images to read.
        transform: maps a PIL image in RGB to a tensor [C, H, W].
        seed: seed of the random numbers in the transform.
        replace: replace an unreadable image by the next readable one.
    """

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor], seed: int = 0, *, replace: bool = True) -> None:
        self.images, self.transform, self.seed, self.replace = images, transform, seed, replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | Key) -> Item:
        epoch, copy, index = (0, 0, key) if isinstance(key, int) else key
        image, label, found, failed = self._read(index)
        with seeded(self.seed, epoch, index, copy):
            return self.transform(image), label, found, failed

    def _one(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        check_resize(self.images.name(index), image, self.transform)
        return image, label

    def _read(self, index: int) -> tuple[Any, int, int, int]:
        try:
            return *self._one(index), index, -1
        except Unreadable as error:
            first = error
        label = self.images.label(index)
        for step in range(1, min(len(self.images), PATIENCE)):
            other = (index + step) % len(self.images)
            try:
                image, its_label = self._one(other)
            except Unreadable:
                continue
            return (image, its_label, other, index) if self.replace else (image, label, index, index)
        if not self.replace:
            from PIL import Image

            return Image.new("RGB", (64, 64), "white"), label, index, index
        tried = min(len(self.images), PATIENCE)
        raise ValueError(
            f"{tried} images in a row cannot be read, the first is {first}; check that the disk is still mounted"
        ) from first

    def failure(self, index: int) -> Unreadable:
        """Return the reason why image ``index``, which failed in a worker, cannot be read; it is read again to find out."""
        try:
            self._one(index)
        except Unreadable as error:
            return error
        return Unreadable(self.images.name(index), "it could not be read the first time, but could be read later")
