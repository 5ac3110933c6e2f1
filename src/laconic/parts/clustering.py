"""Distances, and clusters made of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from laconic.parts.matching import split
from laconic.rows import iota, take
from laconic.shapes import Float, Int


def squared_distances(x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M M"]:
    """|x_i - x_j|^2, from the centred rows (less cancellation), with an exact zero diagonal; in float32, or as `precise`."""
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(1, keepdim=True)
    norm = x.square().sum(-1)
    d2 = torch.baddbmm(norm.unsqueeze(1) + norm.unsqueeze(2), x, x.transpose(1, 2), alpha=-2.0).clamp_min(0.0)
    return d2.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0.0)


def precise(x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M C"]:
    """In float64, where the device has it: for decisions that are not to hang on the rounding of float32."""
    return x.float() if x.device.type == "mps" else x.double()


def density_peaks(
    x: Float[Tensor, "B M C"],
    count: int,
    density: Literal["knn", "paper"] = "knn",
    assign: Literal["denser", "nearest"] = "denser",
    farthest: Literal["own", "sample"] = "own",
    neighbours: int = 5,
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B Q"]]:
    """Density-peak clustering (Rodriguez and Laio 2014; BAT eqs. 6 and 7): the cluster of each row, and the centres.

    Density, as its logarithm (exp underflows): minus the mean squared distance to the nearest rows, itself included,
    over C (``knn``), or minus the sum of squared distances to all rows (``paper``, eq. 6). Distance to the nearest
    denser row; for the densest the largest distance, of its own row or in the whole sample. Centres are the ``count``
    largest products; a row joins the nearest centre that is denser than it (``denser``) or just the nearest.
    Of two rows of equal density the earlier counts as denser.
    """
    d2 = squared_distances(x.detach())
    if density == "knn":
        near = d2.topk(min(neighbours, x.shape[1]), dim=2, largest=False).values
        log_density = -near.mean(2) / x.shape[2]
    else:
        log_density = -d2.sum(2)
    mine, other, order = log_density.unsqueeze(2), log_density.unsqueeze(1), iota(log_density)
    denser = (other > mine) | ((other == mine) & (order.unsqueeze(1) < order.unsqueeze(2)))  # [B, i, j]: j denser than i
    distance = d2.sqrt()
    gap = distance.masked_fill(~denser, math.inf).amin(2)
    widest = distance.amax(2) if farthest == "own" else distance.amax((1, 2)).unsqueeze(1).expand_as(gap)
    gap = torch.where(denser.any(2), gap, widest)
    centres, _ = split(log_density + gap.log(), count)
    to_centre = take(distance, centres).transpose(1, 2)  # [B, M, count]
    if assign == "denser":
        allowed = take(denser.transpose(1, 2), centres).transpose(1, 2)
        allowed = allowed | ~allowed.any(2, keepdim=True)  # nothing denser among the centres: the nearest of all
        to_centre = to_centre.masked_fill(~allowed, math.inf)
    cluster = to_centre.argmin(2)
    return cluster.scatter(1, centres, iota(centres)), centres
