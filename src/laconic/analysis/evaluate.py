"""Evaluation: what a model answers for every image of a set, and how often it is right.

Every image is prepared as timm says the model wants it, at the model's own input size, and counted once, however many
processes share the work: the numbers of all images meet in one table, which is summed over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from laconic.analysis.accuracy import ALONE, COLUMNS, Accuracy, Answers, Processes
from laconic.core.backbone import find_host, unwrapped
from laconic.core.eval_mode import evaluating
from laconic.data import ImageSet, Prepared

__all__ = ["ALONE", "Accuracy", "Answers", "Processes", "answers", "evaluate", "make_loader", "transform_for"]


def evaluate(model: nn.Module, images: ImageSet | DataLoader[Any], **how: Any) -> Accuracy:
    """How often the model is right. What it takes, and what is raised, as `answers`.

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
    """What the model answers for all images, in evaluation mode; its modes are put back afterwards.

    Args:
        model: on its device, in its dtype; it may be wrapped (DDP, torch.compile).
        images: a set, or a loader over `Prepared` with ``replace=False`` (then batch_size, workers and crop are its own).
        batch_size: images in a forward of one process.
        workers: processes that read images.
        reference: what to compare with: a model, which gets the very same pixels, or its answers with their logits.
        processes: who shares the work.
        autocast: run in this dtype, by torch.autocast.
        crop: share of the resized image that is left by the centre crop (default: what timm says of the model).
        keep_logits: keep the logits, as a reference for others.
        title: show the progress under this title.

    Raises:
        ValueError: more classes in the set than the model knows, a loader that replaces images, or a reference without
            logits or with other classes.
    """
    own = None if isinstance(images, DataLoader) else make_loader(model, images, batch_size, workers, processes, crop)
    loader: DataLoader[Any] = images if own is None else own  # type: ignore[assignment]
    prepared = loader.dataset
    if not isinstance(prepared, Prepared) or prepared.replace:
        raise ValueError("evaluate takes a set of images, or a loader over laconic.data.Prepared(..., replace=False)")
    if isinstance(reference, Answers) and reference.logits is None:
        raise ValueError("the answers of the reference came without logits; ask for them with keep_logits=True")
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
    seen = (table[:, 0:1] + table[:, -1:]).clamp_min(1)  # a loader of one's own may give an image to two processes
    failures = table[:, COLUMNS.index("failed")].nonzero().flatten().tolist()
    unreadable = tuple(prepared.failure(number) for number in failures)
    numbers = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    return Answers(table / seen, numbers, torch.cat(kept) if kept else None, unreadable, reference is not None)


class Run:
    """One model at work on batches, beside a reference."""

    def __init__(
        self, model: nn.Module, reference: nn.Module | Answers | None, autocast: torch.dtype | None, classes: int
    ) -> None:
        # the wrapper of DDP would wait for the others at every forward, of which they may have one less
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.reference, self.autocast, self.classes = reference, autocast, classes
        weights = next(model.parameters(), torch.zeros(()))
        self.device, self.dtype = weights.device, weights.dtype

    def logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """The answers to a batch, [B, C] in float32 on the CPU."""
        pixels = pixels.to(self.device, torch.float32 if self.autocast else self.dtype, non_blocking=True)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = model(pixels)
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise ValueError(f"expected logits [images, classes] from the model, got {tuple(getattr(out, 'shape', ()))}")
        if out.shape[1] < self.classes:
            raise ValueError(
                f"the images have {self.classes} classes, but the model answers for {out.shape[1]}; take the data that it was "
                f"trained on, or a model with num_classes={self.classes}"
            )
        return out.float().cpu()

    def batch(self, pixels: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's rows of the table, [B, COLUMNS], and its logits [B, C]."""
        logits = self.logits(self.model, pixels)
        finite = logits.isfinite().all(1)
        hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & finite[:, None]
        loss = F.cross_entropy(logits.double(), labels, reduction="none").where(finite, torch.nan)
        agrees = divergence = torch.zeros(len(labels))
        if self.reference is not None:
            full = self._reference(pixels, index)
            if full.shape != logits.shape:
                raise ValueError(f"the reference answers for {full.shape[1]} classes, and the model for {logits.shape[1]}")
            own, other = logits.double().log_softmax(1), full.double().log_softmax(1)
            agrees = (logits.argmax(1) == full.argmax(1)) & finite
            divergence = (other.exp() * (other - own)).sum(1)
        read, failed = torch.ones(len(labels)), torch.zeros(len(labels))
        columns = (read, hits[:, 0], hits.any(1), loss, finite, agrees, divergence, failed)
        return torch.stack([column.double() for column in columns], 1), logits

    def _reference(self, pixels: Tensor, index: Tensor) -> Tensor:
        if isinstance(self.reference, nn.Module):
            return self.logits(self.reference, pixels)
        known: Any = self.reference
        try:
            return known.logits[[known.place[number] for number in index.tolist()]]
        except KeyError as error:
            raise ValueError(f"the reference was not asked about image {error.args[0]}; take the same images") from error


def _progress(loader: DataLoader[Any], title: str) -> Iterable[Any]:
    if not title:
        return loader
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Any] = tqdm(loader, desc=title, unit="batch", leave=False, disable=None)
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
    """A loader of this process's share of the images, as the model wants them."""
    prepared = Prepared(images, transform_for(model, crop), replace=False)
    share: Sequence[int] = range(processes.rank, len(images), processes.world)
    cuda = next(model.parameters(), torch.zeros(())).is_cuda
    own = torch.Generator()  # without one of its own, a loader takes a number from the generator of the training
    settings: dict[str, Any] = {"num_workers": workers, "pin_memory": cuda, "generator": own}
    return DataLoader(prepared, batch_size, sampler=share, **settings)


def transform_for(model: nn.Module, crop: float | None = None) -> Callable[[Any], Tensor]:
    """Timm's transform for evaluation, at the input size that the model has now."""
    from timm.data import create_transform  # type: ignore[attr-defined]

    return create_transform(**config_for(model, crop), is_training=False)


def config_for(model: nn.Module, crop: float | None = None) -> dict[str, Any]:
    """How timm prepares images for this model: input_size, interpolation, mean, std, crop_pct, crop_mode.

    At the input size that the model has now: timm itself goes by the size of the pretrained weights, also for a model made
    for another one. ``crop`` takes the place of crop_pct.

    Raises:
        ValueError: a crop that is not above 0 and at most 1.
    """
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop must be a share above 0 and at most 1, not {crop}")
    plain = unwrapped(model)
    host, entry = find_host(plain)
    size = {"input_size": (3, *entry.example(host).shape[2:])}
    config: dict[str, Any] = resolve_model_data_config(plain, args=size)  # type: ignore[no-untyped-call]
    return config if crop is None else {**config, "crop_pct": crop}
