"""Lloyd's k-means, without randomness and with no cluster left empty."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.parts.matching import share
from laconic.rows import add_rows, iota, take
from laconic.shapes import Float, Int


def lloyd(
    x: Float[Tensor, "B M C"], weight: Float[Tensor, "B M"], first: Int[Tensor, "B Q"], iterations: int
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B Q"]]:
    """The cluster of each row after so many iterations from the rows ``first``, and the row nearest to each centre.

    An iteration takes every row to the nearest centre (squared L2; ties: the first) and every centre to the mean of its
    rows by ``weight``. A cluster that would be empty takes the row farthest from its centre, out of all that are not the
    nearest to theirs. So the sum of weight * |x - mean of its cluster|^2 never rises.
    """
    x = x.detach().float()
    x, weight = x - x.mean(1, keepdim=True), weight.detach()  # centred: less cancellation
    centres = take(x, first)
    cluster, nearest = first, first
    for _ in range(iterations):
        distance = _distances(x, centres)
        cluster = _fill(distance, distance.argmin(2))
        nearest = _nearest(distance, _members(cluster, first))
        weighted = x * share(weight, cluster, first.shape[1]).unsqueeze(-1)
        centres = add_rows(weighted, cluster, first.shape[1])
    return cluster, nearest


def strided(like: Tensor, count: int) -> Int[Tensor, "B Q"]:
    """``count`` places spread evenly over a sequence [B, L, ...]: the middles of as many equal pieces."""
    return (2 * iota(like[:, :count]) + 1) * like.shape[1] // (2 * count)


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    norms = x.square().sum(-1).unsqueeze(2) + centres.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(norms, x, centres.transpose(1, 2), alpha=-2.0).clamp_min(0.0)


def _members(cluster: Tensor, centres: Tensor) -> Tensor:
    """[B, M, Q]: whether row m is in cluster q."""
    return cluster.unsqueeze(2) == iota(centres).unsqueeze(1)


def _nearest(distance: Tensor, member: Tensor) -> Tensor:
    return distance.masked_fill(~member, math.inf).argmin(1)


def _fill(distance: Tensor, cluster: Tensor) -> Tensor:
    """Give every empty cluster one row, the farthest first; a cluster keeps its nearest row."""
    member = _members(cluster, distance[:, 0])
    empty = ~member.any(1)
    stays = (member & (iota(cluster).unsqueeze(2) == _nearest(distance, member).unsqueeze(1))).any(2)
    own = distance.gather(2, cluster.unsqueeze(2)).squeeze(2).masked_fill(stays, -1.0)
    far = own.sort(dim=1, descending=True, stable=True).indices[:, : empty.shape[1]]
    vacant = empty.int().sort(dim=1, descending=True, stable=True).indices  # the empty ones, then the others
    due = iota(vacant) < empty.sum(1, keepdim=True)
    return cluster.scatter(1, far, torch.where(due, vacant, cluster.gather(1, far)))
