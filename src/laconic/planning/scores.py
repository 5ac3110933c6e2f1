"""The images that choose and those that judge in `laconic.tune`, and the scores that a run keeps in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laconic.checkpoints.saved_files import digest
from laconic.core.files import append_line, json_lines
from laconic.planning.measures import Kind, Scored

Values = NDArray[np.float64]


@dataclass
class Scores:
    """The scores of candidates that were computed, in a file if there is one.

    ``subject`` identifies weights, images, labels and measure; lines of other subjects stay in the file and are not used.
    """

    path: Path | None = None
    subject: str = ""
    known: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, model: nn.Module, images: Tensor, labels: Tensor | None, kind: Kind | Scored) -> Scores:
        """Read the scores of a subject.

        Raises:
            ValueError: the measure is a callable, which may have changed since the file was written.
        """
        if path is None:
            return cls()
        if not isinstance(kind, str):
            raise ValueError("record needs a measure by name: whether a callable has changed since then cannot be known")
        found = hashlib.sha256(f"{kind} {model!r} {digest(model)}".encode())
        for tensor in (images, *(() if labels is None else (labels,))):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        subject = found.hexdigest()
        return cls(path, subject, {line["run"]: line["scores"] for line in json_lines(path) if line.get("subject") == subject})

    def find(self, half: str, described: Mapping[str, Any] | None, count: int) -> Values | None:
        """Return the scores of the first ``count`` images of a half under a candidate; None if they are not known."""
        found = self.known.get(_run(half, described, count))
        return None if found is None else np.array(found)

    def add(self, half: str, described: Mapping[str, Any] | None, count: int, scores: Values) -> None:
        """Keep scores, also in the file."""
        run = _run(half, described, count)
        self.known[run] = scores.tolist()
        if self.path is not None:
            append_line(self.path, json.dumps({"subject": self.subject, "run": run, "scores": self.known[run]}))


def _run(half: str, described: Mapping[str, Any] | None, count: int) -> str:
    return json.dumps([half, count, described], sort_keys=True)


def halves_of(count: int, labels: Tensor | None, kind: Kind | Scored) -> tuple[Tensor, Tensor]:
    """Return the indices of the images that choose, and of those that judge.

    Without labels every other image chooses. With labels, each half gets every other image of each label; for ``pairs``, all
    images of every other label, so that images that belong together stay together.
    """
    if labels is None:
        order = torch.arange(count)
        return order[::2], order[1::2]
    names, number = torch.unique(labels.cpu(), return_inverse=True)
    if kind == "pairs":
        first = number % 2 == 0
    else:
        place = torch.zeros(len(names), dtype=torch.long)
        rank = torch.empty(count, dtype=torch.long)
        for i, name in enumerate(number.tolist()):
            rank[i], place[name] = place[name], place[name] + 1
        first = (rank + number) % 2 == 0  # the label's number is added, so that single images do not all get into one half
    return first.nonzero().flatten(), (~first).nonzero().flatten()
