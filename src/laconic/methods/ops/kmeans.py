"""Lloyd's k-means, without randomness and without empty clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, first_least, gather_rows, places
from laconic.core.shape_types import Float, Int
from laconic.methods.ops.matching import group_normalize
from laconic.methods.ops.nearest import best_of_rows


def lloyd(
    x: Float[Tensor, "B M C"], weight: Float[Tensor, "B M"], first: Int[Tensor, "B Q"], iterations: int
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B Q"]]:
    """Return the cluster of each row after ``iterations``, starting from the rows ``first``, and each centre's nearest row.

    An iteration assigns every row to the nearest centre (squared L2; ties: the first) and moves every centre to the mean of
    its rows by ``weight``. A cluster that would be empty gets the row farthest from its centre, among all rows that are not
    the nearest to their centre. So the sum of weight * |x - mean of its cluster|^2 never increases.
    """
    x = x.detach().float()
    x, weight, count = x - x.mean(1, keepdim=True), weight.detach(), first.shape[1]  # centred: less cancellation
    centres = gather_rows(x, first)
    cluster, nearest = first, first
    for number in range(iterations):
        if number:
            centres = add_rows(x * group_normalize(weight, cluster, count).unsqueeze(-1), cluster, count)
        distance, cluster = _to_nearest(x, centres)
        cluster = _fill(distance, cluster, count)
        nearest = first_least(distance, cluster, count)
    return cluster, nearest


def strided(like: Tensor, count: int) -> Int[Tensor, "B Q"]:
    """Return ``count`` positions spread evenly over a sequence [B, L, ...]: the middles of ``count`` equal pieces."""
    return (2 * arange_like(like[:, :count]) + 1) * like.shape[1] // (2 * count)


def _to_nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance of each row to the nearest centre, and the index of that centre."""
    norm = centres.square().sum(-1).unsqueeze(1)

    def near(part: Tensor) -> Tensor:
        d2 = torch.baddbmm(part.square().sum(-1).unsqueeze(2) + norm, part, centres.transpose(1, 2), alpha=-2.0)
        return -d2.clamp_min(0.0)

    closeness, cluster = best_of_rows(x, centres.shape[1], near)
    return -closeness, cluster


def _fill(distance: Tensor, cluster: Tensor, count: int) -> Tensor:
    """Give every empty cluster one row, the farthest first; a cluster keeps its nearest row."""
    held = torch.zeros_like(distance[:, :count]).scatter(1, cluster, 1.0)
    stays = first_least(distance, cluster, count).gather(1, cluster) == arange_like(cluster)
    far = distance.masked_fill(stays, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :count]
    vacant = places(held == 0, count)  # the empty clusters, then the others
    due = arange_like(vacant) < (held == 0).sum(1, keepdim=True)
    return cluster.scatter(1, far, torch.where(due, vacant, cluster.gather(1, far)))
