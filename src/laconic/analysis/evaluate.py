"""Evaluation: the outputs of a model for every image of a set, and its accuracy.

Images are transformed as timm's data config of the model says, at the model's own input size. Each image counts once for any
number of processes: the numbers of all images are in one table, which is summed over the processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from laconic.analysis.accuracy import ALONE, COLUMNS, Accuracy, Answers, Processes
from laconic.core.eval_mode import evaluating
from laconic.data import ImageSet, Prepared
from laconic.data.preprocessing import config_for, transform_for
from laconic.data.workers import batches as read_batches
from laconic.data.workers import begin, check_shared_memory

__all__ = ["ALONE", "Accuracy", "Answers", "Processes", "answers", "config_for", "evaluate", "make_loader", "transform_for"]


def evaluate(model: nn.Module, images: ImageSet | DataLoader[Any], **how: Any) -> Accuracy:
    """Return the accuracy of a model. The options are those of `answers`.

    Raises:
        ValueError: as `answers`; no image could be read.
    """
    return answers(model, images, **how).accuracy


def answers(
    model: nn.Module,
    images: ImageSet | DataLoader[Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    reference: nn.Module | Answers | None = None,
    processes: Processes = ALONE,
    autocast: torch.dtype | None = None,
    crop: float | None = None,
    keep_logits: bool = False,
    title: str = "",
) -> Answers:
    """Run the model on all images in evaluation mode and return its outputs; its modes are restored afterwards.

    Args:
        model: the model; it runs on its device and in its dtype, and may be wrapped (DDP, torch.compile).
        images: a set, or a loader over `Prepared` with ``replace=False`` (then batch_size, workers and crop are ignored).
        batch_size: images per forward of one process.
        workers: processes that read images.
        reference: a model to compare with, which gets the same pixels, or its `Answers` with logits.
        processes: the processes that share the evaluation.
        autocast: run in this dtype with torch.autocast.
        crop: share of the resized image that the centre crop keeps (default: timm's value for the model).
        keep_logits: keep the logits, for use as a reference.
        title: title of the progress bar; empty for none.

    Raises:
        ValueError: the set has more classes than the model, the loader replaces images, or the reference has no logits or
            another number of classes.
    """
    own = None if isinstance(images, DataLoader) else make_loader(model, images, batch_size, workers, processes, crop)
    loader: DataLoader[Any] = images if own is None else own  # type: ignore[assignment]
    prepared = loader.dataset
    if not isinstance(prepared, Prepared) or prepared.replace:
        raise ValueError("evaluate takes a set of images, or a loader over laconic.data.Prepared(..., replace=False)")
    if isinstance(reference, Answers) and reference.logits is None:
        raise ValueError("the reference answers have no logits; create them with keep_logits=True")
    table = torch.zeros(len(prepared), len(COLUMNS), dtype=torch.float64)
    rows, kept = list[Tensor](), list[Tensor]()
    run = Run(model, reference, autocast, len(prepared.images.classes))
    with evaluating(model, reference), torch.no_grad():
        for pixels, labels, index, failed in _progress(loader, title):
            table[failed[failed >= 0], COLUMNS.index("failed")] = 1
            good = failed < 0
            if good.any():
                numbers, logits = run.batch(pixels[good], labels[good], index[good])
                table[index[good]] = numbers
                rows.append(index[good])
                kept += [logits] if keep_logits else []
    table = processes.total(table.to(run.device)).cpu()
    seen = (table[:, 0:1] + table[:, -1:]).clamp_min(1)  # a user's own loader may give an image to two processes
    failures = table[:, COLUMNS.index("failed")].nonzero().flatten().tolist()
    unreadable = tuple(prepared.failure(number) for number in failures)
    numbers = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    return Answers(table / seen, numbers, torch.cat(kept) if kept else None, unreadable, reference is not None)


class Run:
    """Run a model, and a reference if there is one, on batches."""

    def __init__(
        self, model: nn.Module, reference: nn.Module | Answers | None, autocast: torch.dtype | None, classes: int
    ) -> None:
        # DDP's wrapper would wait for the other processes at every forward, and they may have one batch less
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.reference, self.autocast, self.classes = reference, autocast, classes
        weights = next(model.parameters(), torch.zeros(()))
        self.device, self.dtype = weights.device, weights.dtype

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return the logits of a batch, [B, C], in float32 on the CPU."""
        pixels = pixels.to(self.device, torch.float32 if self.autocast else self.dtype, non_blocking=True)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = model(pixels)
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise ValueError(f"expected logits [images, classes] from the model, got {tuple(getattr(out, 'shape', ()))}")
        if out.shape[1] < self.classes:
            raise ValueError(
                f"the images have {self.classes} classes, but the model has {out.shape[1]} outputs; use the data that it was "
                f"trained on, or a model with num_classes={self.classes}"
            )
        return out.float().cpu()

    def batch(self, pixels: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table rows [B, COLUMNS] and the logits [B, C] of a batch."""
        logits = self.logits(self.model, pixels)
        finite = logits.isfinite().all(1)
        hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & finite[:, None]
        loss = F.cross_entropy(logits.double(), labels, reduction="none").where(finite, torch.nan)
        agrees = divergence = torch.zeros(len(labels))
        if self.reference is not None:
            full = self._reference(pixels, index)
            if full.shape != logits.shape:
                raise ValueError(
                    f"the reference has {full.shape[1]} classes, but the model has {logits.shape[1]}; use models with the "
                    "same classes"
                )
            own, other = logits.double().log_softmax(1), full.double().log_softmax(1)
            agrees = (logits.argmax(1) == full.argmax(1)) & finite
            divergence = (other.exp() * (other - own)).sum(1)
        read, failed = torch.ones(len(labels)), torch.zeros(len(labels))
        first = logits.argmax(1).where(finite, -1)
        columns = (read, hits[:, 0], hits.any(1), loss, finite, agrees, divergence, labels, first, failed)
        return torch.stack([column.double() for column in columns], 1), logits

    def _reference(self, pixels: Tensor, index: Tensor) -> Tensor:
        if isinstance(self.reference, nn.Module):
            return self.logits(self.reference, pixels)
        known: Any = self.reference
        try:
            return known.logits[[known.place[number] for number in index.tolist()]]
        except KeyError as error:
            raise ValueError(f"the reference has no answer for image {error.args[0]}; use the same images for both") from error


def _progress(loader: DataLoader[Any], title: str) -> Iterable[Any]:
    if not title:
        return read_batches(loader)
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Any] = tqdm(read_batches(loader), total=len(loader), desc=title, unit="batch", leave=False, disable=None)
    return bar


# ------------------------------------------------------------------------------------------------ preparing
def make_loader(
    model: nn.Module,
    images: ImageSet,
    batch_size: int = 64,
    workers: int = 0,
    processes: Processes = ALONE,
    crop: float | None = None,
) -> DataLoader[Any]:
    """Return a loader over this process's share of the images, transformed for the model."""
    prepared = Prepared(images, transform_for(model, crop), replace=False)
    share = range(processes.rank, len(images), processes.world)
    cuda = next(model.parameters(), torch.zeros(())).is_cuda
    return loader_of(prepared, config_for(model)["input_size"], batch_size, workers, share, pin_memory=cuda)


def loader_of(
    prepared: Prepared,
    shape: Sequence[int],
    batch_size: int = 64,
    workers: int = 0,
    share: Sequence[int] | None = None,
    *,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return a loader over prepared images, or a share of them by their numbers; ``shape`` is [channels, height, width].

    Raises:
        Refusal: the workers need more shared memory than there is.
    """
    numbers = range(len(prepared)) if share is None else share
    check_shared_memory(workers, 4 * min(batch_size, len(prepared)) * math.prod(shape))
    own = torch.Generator()  # without its own generator, a loader would advance the generator of a training run
    settings: dict[str, Any] = {"num_workers": workers, "generator": own, "worker_init_fn": begin}
    return DataLoader(prepared, batch_size, sampler=numbers, pin_memory=pin_memory, **settings)
