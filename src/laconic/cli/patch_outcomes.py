"""Outcomes of the patches (kept, merged, dropped) of the object and of its surroundings, for images with known objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.analysis.provenance import Stage, provenance
from laconic.cli.output import Table
from laconic.data import ImageSet
from laconic.data.generated import Scenes
from laconic.training.token_labels import COVERED, patch_labels

HEADER = ("", "object: kept", "merged", "dropped", "surroundings: kept", "merged", "dropped")
EXPLAINED = (
    "Shares of the patches in %, at the end, mean over the images. kept: the patch still has its own token. merged: a token of "
    "another patch holds it. dropped: no token does. The object's patches are those of which it covers more than "
    f"{COVERED:.0%}, the others are its surroundings."
)


@dataclass(frozen=True)
class Shares:
    """Shares of some patches that were kept, merged and dropped: together 1."""

    kept: float
    merged: float
    dropped: float


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the object's patches and of the others, after the last block that reduces; mean over the images."""

    object: Shares
    surroundings: Shares

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return asdict(self)


def object_patches(images: ImageSet, grid: tuple[int, int]) -> Tensor | None:
    """Return a mask of the patches of every image that show its object, [N, P] of bool; None if that is not known."""
    if not isinstance(images, Scenes):
        return None
    return patch_labels(images, list(range(len(images))), grid) < len(images.classes)


def outcomes(stage: Stage) -> Tensor:
    """Return masks of the patches of a batch that were kept, merged and dropped, [B, P, 3] of bool."""
    held = stage.where >= 0
    own = torch.zeros_like(held).scatter(1, stage.kept, True) & held  # padding has a place, but holds no patch
    return torch.stack([own, held & ~own, ~held & ~own], 2)


class Count:
    """Sums of the outcomes of a reduced model's patches, over images in their order.

    Args:
        shown: mask of the patches that show the object, [N, P].
    """

    def __init__(self, shown: Tensor) -> None:
        self.shown, self.seen, self.images = shown, 0, torch.zeros(2, 1)
        self.shares = torch.zeros(2, 3, dtype=torch.float64)

    def add(self, stage: Stage) -> None:
        """Count the next batch."""
        found = outcomes(stage).cpu().double()
        shown = self.shown[self.seen : self.seen + len(found)]
        self.seen += len(found)
        for row, chosen in enumerate((shown, ~shown)):
            patches = chosen.sum(1, keepdim=True)
            self.shares[row] += ((found * chosen[..., None]).sum(1) / patches.clamp_min(1)).sum(0)
            self.images[row] += (patches > 0).sum()  # an object hidden behind a strip may cover no patch

    @property
    def outcomes(self) -> Outcomes:
        """The means over the images so far."""
        rows = (self.shares / self.images.clamp_min(1)).tolist()
        return Outcomes(*(Shares(*row) for row in rows))


@contextmanager
def counting(model: nn.Module, shown: Tensor) -> Iterator[Count]:
    """Count the outcomes of every forward of a reduced model."""
    count = Count(shown)
    handle = model.register_forward_hook(lambda *_: count.add(provenance(model).final))
    try:
        yield count
    finally:
        handle.remove()


def table(rows: Sequence[tuple[str, Outcomes]], title: str) -> Table:
    """Return a table of labels with their outcomes."""

    def cells(label: str, found: Outcomes) -> tuple[str, ...]:
        parts = (found.object, found.surroundings)
        return (label, *(f"{share * 100:.0f}" for part in parts for share in (part.kept, part.merged, part.dropped)))

    return Table(title, HEADER, tuple(cells(*row) for row in rows))
