"""The images that choose and those that judge in `laconic.tune`, and the scores that a run keeps in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from laconic.checkpoints.saved_files import digest
from laconic.core.files import append_line, json_lines
from laconic.planning.measures import Kind, Measure, Scored

Values = NDArray[np.float64]
ORDER = "two by two"  # of the images in `halves_of`: scores that were kept in another order are not used


@dataclass
class Scores:
    """The scores of candidates that were computed, in a file if there is one.

    ``subject`` identifies weights, images, labels and measure; lines of other subjects stay in the file and are not used.
    With ``by_image`` the score of an image does not depend on the others, so that scores of fewer or more images are used.
    """

    path: Path | None = None
    subject: str = ""
    by_image: bool = False
    known: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, measure: Measure, images: Tensor, labels: Tensor | None) -> Scores:
        """Read the scores of all images and labels by a measure of some of them.

        Raises:
            ValueError: the measure is a callable, which may have changed since the file was written.
        """
        if path is None:
            return cls(by_image=measure.by_image)
        if not isinstance(measure.kind, str):
            raise ValueError("record needs a measure by name: whether a callable has changed since then cannot be known")
        found = hashlib.sha256(f"{ORDER} {measure.kind} {measure.base!r} {digest(measure.base)}".encode())
        for tensor in (images, *(() if labels is None else (labels,))):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        subject = found.hexdigest()
        known = {line["run"]: line["scores"] for line in json_lines(path) if line.get("subject") == subject}
        return cls(path, subject, measure.by_image, known)

    def find(self, half: str, described: Mapping[str, Any] | None, count: int) -> Values:
        """Return the known scores of the first ``count`` images of a half under a candidate: all, fewer, or none."""
        return np.array(self.known.get(self._run(half, described, count), ())[:count])

    def add(self, half: str, described: Mapping[str, Any] | None, count: int, scores: Values) -> None:
        """Keep the scores of the first ``count`` images, also in the file."""
        run = self._run(half, described, count)
        self.known[run] = scores.tolist()
        if self.path is not None:
            append_line(self.path, json.dumps({"subject": self.subject, "run": run, "scores": self.known[run]}))

    def _run(self, half: str, described: Mapping[str, Any] | None, count: int) -> str:
        return json.dumps([half, None if self.by_image else count, described], sort_keys=True)


def halves_of(count: int, labels: Tensor | None, kind: Kind | Scored) -> tuple[Tensor, Tensor]:
    """Return the indices of the images that choose, and of those that judge, in the order in which they are used.

    With labels, each half gets every other image of each label; for ``pairs``, all images of every other label, so that images
    that belong together stay together. The order is random but always the same, since the first images of a folder may be of
    one kind.
    """
    if labels is None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return order[::2], order[1::2]
    number = torch.unique(labels.cpu(), return_inverse=True)[1]
    # the label's number is added to the rank, so that single images do not all get into one half
    turn = number if kind == "pairs" else torch.tensor(ranks(number.tolist())) + number
    first = turn % 2 == 0
    return two_by_two(first.nonzero().flatten(), number), two_by_two((~first).nonzero().flatten(), number)


def two_by_two(chosen: Tensor, number: Tensor) -> Tensor:
    """Return images in random order, two of each label in turn: the first images have many labels, and pairs of each.

    Args:
        chosen: [M], indices of images.
        number: [N], the label of every image.
    """
    shuffled = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    labels: list[int] = number[shuffled].tolist()
    turn = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    keys = [(rank // 2, turn[label]) for rank, label in zip(ranks(labels), labels, strict=True)]
    return shuffled[sorted(range(len(keys)), key=keys.__getitem__)]


def ranks(labels: Sequence[int]) -> list[int]:
    """Return for every label how often it occurs before."""
    seen, out = dict[int, int](), list[int]()
    for label in labels:
        out.append(seen.get(label, 0))
        seen[label] = out[-1] + 1
    return out
