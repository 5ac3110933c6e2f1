"""Pairwise squared distances, and density-peak clustering."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like, gather_rows, in_parts, joined_parts
from laconic.core.shape_types import Float, Int
from laconic.methods.ops.matching import topk_split


class Distances:
    """Squared distances |x_i - x_j|^2 of rows, from centred rows (less cancellation), with an exact zero diagonal.

    Computed in float32, or in float64 for float64 input (see `precise`). A small matrix is computed once and held as a whole;
    otherwise each of the ``parts`` (row numbers) is computed on request, as a matrix [B, part, M].
    """

    def __init__(self, x: Float[Tensor, "B M C"]) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        self.x = x - x.mean(1, keepdim=True)
        self.norm = self.x.square().sum(-1)
        every = torch.arange(x.shape[1], device=x.device)
        self.parts = [part.squeeze(0) for part in in_parts(every.unsqueeze(0), x.shape[1])]
        self.whole = self._between(every, (self.x, self.norm), self.x, self.norm, every) if len(self.parts) == 1 else None

    def of(self, part: Int[Tensor, " m"]) -> Float[Tensor, "B m M"]:
        """Return the distances from these rows to all rows."""
        if self.whole is not None:
            return self.whole
        return self._between(part, self._rows(part), self.x, self.norm, torch.arange(self.x.shape[1], device=self.x.device))

    def to(self, part: Int[Tensor, " m"], rows: Int[Tensor, "B Q"]) -> Float[Tensor, "B m Q"]:
        """Return the distances from these rows to ``rows``, which differ by image."""
        if self.whole is not None:
            return gather_rows(self.whole, rows).transpose(1, 2)
        return self._between(part, self._rows(part), gather_rows(self.x, rows), gather_rows(self.norm, rows), rows.unsqueeze(1))

    def _rows(self, part: Tensor) -> tuple[Tensor, Tensor]:
        return self.x.index_select(1, part), self.norm.index_select(1, part)

    def _between(self, part: Tensor, own: tuple[Tensor, Tensor], y: Tensor, norm: Tensor, rows: Tensor) -> Tensor:
        x, length = own
        d2 = torch.baddbmm(length.unsqueeze(2) + norm.unsqueeze(1), x, y.transpose(1, 2), alpha=-2.0)
        return d2.clamp_min(0.0).masked_fill(part.unsqueeze(1) == rows, 0.0)


def squared_distances(x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M M"]:
    """Return the whole matrix of `Distances`, for methods that need all of it."""
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(1, keepdim=True)
    norm = x.square().sum(-1)
    d2 = torch.baddbmm(norm.unsqueeze(1) + norm.unsqueeze(2), x, x.transpose(1, 2), alpha=-2.0).clamp_min(0.0)
    return d2.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0.0)


def precise(x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
    """Return ``x`` in float64 if the device has it, for decisions that must not depend on the rounding of float32."""
    return x.float() if x.device.type == "mps" else x.double()


def density_peaks(
    x: Float[Tensor, "B M C"],
    count: int,
    density: Literal["knn", "paper"] = "knn",
    assign: Literal["denser", "nearest"] = "denser",
    farthest: Literal["own", "sample"] = "own",
    neighbours: int = 5,
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B Q"]]:
    """Return the cluster of each row and the centres, by density-peak clustering (Rodriguez and Laio 2014; BAT eqs. 6-7).

    The density, as its logarithm (exp underflows), is minus the mean squared distance to the nearest rows, itself included,
    over C (``knn``), or minus the sum of squared distances to all rows (``paper``, eq. 6). The distance is that to the nearest
    denser row; for the densest row it is the largest distance, of its own row or in the whole sample (``farthest``). Centres
    are the ``count`` rows with the largest product of the two; a row joins the nearest centre that is denser than it
    (``denser``) or the nearest of all (``nearest``). Of two rows of equal density the earlier counts as denser.

    Memory is linear in M: for many rows the distances are computed three times and never stored (see `Distances`).
    """
    distances = Distances(x.detach())
    near: list[Tensor] = []
    widest: list[Tensor] = []
    gaps: list[Tensor] = []
    for part in distances.parts:
        d2 = distances.of(part)
        few = d2.topk(min(neighbours, x.shape[1]), dim=2, largest=False).values if density == "knn" else None
        near.append(-d2.sum(2) if few is None else -few.mean(2) / x.shape[2])
        widest.append(d2.amax(2).sqrt())
    log_density, wide = joined_parts(near), joined_parts(widest)
    line, _ = topk_split(log_density, x.shape[1])
    rank = torch.empty_like(line).scatter(1, line, arange_like(line))  # rank of each row by density: 0 is the densest
    for part in distances.parts:
        denser = rank.unsqueeze(1) < rank[:, part].unsqueeze(2)
        gaps.append(distances.of(part).masked_fill(~denser, math.inf).amin(2).sqrt())
    gap = joined_parts(gaps)
    wide = wide if farthest == "own" else wide.amax(1, keepdim=True)
    gap = torch.where(gap < math.inf, gap, wide)
    centres, _ = topk_split(log_density + gap.log(), count)
    cluster: list[Tensor] = []
    for part in distances.parts:
        to_centre = distances.to(part, centres)
        if assign == "denser":
            allowed = rank.gather(1, centres).unsqueeze(1) < rank[:, part].unsqueeze(2)
            allowed = allowed | ~allowed.any(2, keepdim=True)  # no centre is denser: use the nearest of all
            to_centre = to_centre.masked_fill(~allowed, math.inf)
        cluster.append(to_centre.argmin(2))
    return joined_parts(cluster).scatter(1, centres, arange_like(centres)), centres
