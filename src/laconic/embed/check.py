"""Compare the vectors of a reduced model with the unreduced model's, and the time that both take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.analysis.fidelity import class_cosine, patch_cosine
from laconic.analysis.timing import Quartiles, Setting, ratios, time_runs
from laconic.core.files import Refusal
from laconic.core.shape_types import Float
from laconic.embed.collection import Collection
from laconic.embed.embedder import Embedder
from laconic.planning.fidelity import Mean

NEIGHBOURS = 10
CHUNK = 64  # pictures prepared at a time


@dataclass(frozen=True)
class Check:
    """Fidelity of a reduced model on some pictures: means with half of their 95 % intervals, and the speed-up."""

    pictures: int
    cosine: Mean
    worst: float  # the lowest cosine
    recall: Mean  # share of the 10 nearest other pictures that are the same
    speedup: Quartiles

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        parts = {"cosine": vars(self.cosine), "recall_at_10": vars(self.recall), "speedup": vars(self.speedup)}
        return {"pictures": self.pictures, "worst_cosine": self.worst, **parts}

    def failures(self, least_cosine: float | None, least_recall: float | None) -> list[str]:
        """Return what is below the least that the user wants, in words."""
        asked = (("cosine", self.cosine, least_cosine), ("recall@10", self.recall, least_recall))
        return [
            f"{name} {found.mean:.5f}, {least:g} wanted"
            for name, found, least in asked
            if least is not None and not found.mean >= least
        ]


def check(base: Embedder, own: Embedder, collection: Collection, count: int, rounds: int = 5) -> Check:
    """Embed ``count`` evenly spaced pictures by the unreduced and by the reduced model, and time both, interleaved.

    Raises:
        Refusal: fewer than 12 pictures can be read, too few for 10 neighbours of each.
    """
    numbers = [i * len(collection) // min(count, len(collection)) for i in range(min(count, len(collection)))]
    found = tuple[list[Tensor], list[Tensor]](([], []))
    cosines, first = list[float](), torch.zeros(0)
    for start in range(0, len(numbers), CHUNK):
        part = numbers[start : start + CHUNK]
        pictures = own.prepare([collection.content(i) for i in part], [collection.ids[i] for i in part])
        pixels = pictures.pixels[[not error for error in pictures.errors]]
        if not len(pixels):
            continue
        first = pixels if len(pixels) > len(first) else first
        full, reduced = (torch.from_numpy(model.embed(pixels)).float() for model in (base, own))
        cosines += (patch_cosine if full.dim() == 3 else class_cosine)(full, reduced).tolist()
        for kept, vectors in zip(found, (full, reduced), strict=True):
            kept.append(vectors.mean(1) if vectors.dim() == 3 else vectors)
    if len(cosines) < NEIGHBOURS + 2:
        raise Refusal(f"--check needs {NEIGHBOURS + 2} pictures that can be read, and {len(cosines)} of {len(numbers)} can")
    shares = recall(torch.cat(found[0]), torch.cat(found[1]))
    timed = first[: own.forward_size * own.threads * max(1, 8 // own.forward_size)]
    runs = {"unreduced": lambda: base.embed(timed), "reduced": lambda: own.embed(timed)}
    samples = time_runs(runs, Setting(rounds=rounds, device=own.device.type), 1)  # type: ignore[arg-type]
    speedup = ratios(samples["reduced"])[0]
    return Check(len(cosines), Mean.of(cosines), min(cosines), Mean.of(shares), speedup)


def recall(base: Float[Tensor, "N C"], own: Float[Tensor, "N C"]) -> Sequence[float]:
    """Return for each row the share of its 10 nearest other rows (by cosine) that are the same in both."""

    def nearest(vectors: Tensor) -> Tensor:
        unit = F.normalize(vectors, dim=1)
        return (unit @ unit.T).fill_diagonal_(-2).topk(NEIGHBOURS).indices

    one, two = nearest(base), nearest(own)
    shares: list[float] = (one.unsqueeze(2) == two.unsqueeze(1)).any(2).double().mean(1).tolist()
    return shares
