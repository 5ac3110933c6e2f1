"""K-medoids from a matrix of distances, for a whole batch at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.core.gather import arange_like, first_least, gather_rows
from laconic.core.shape_types import Float, Int


def spread(distance: Float[Tensor, "B L L"], count: int) -> Int[Tensor, "B M"]:
    """Return the row nearest to all others, then repeatedly the row farthest from its nearest chosen row, [B, count]."""
    chosen = [distance.sum(2).argmin(1, keepdim=True)]
    reach = torch.full_like(distance[:, 0], math.inf)
    for _ in range(count - 1):
        reach = torch.minimum(reach, gather_rows(distance, chosen[-1]).squeeze(1))
        reach = reach.scatter(1, chosen[-1], -1.0)  # below 0, so that no row is chosen twice if rows are equal
        chosen.append(reach.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def medoids_of(
    distance: Float[Tensor, "B L L"], weight: Float[Tensor, "B L"], medoids: Int[Tensor, "B M"], iterations: int, cost: str
) -> Int[Tensor, "B M"]:
    """Return the medoids after ``iterations`` of assigning rows to medoids and choosing the medoids again."""
    to_all = weight * distance.sum(2)
    for _ in range(iterations):
        cluster = nearest_medoid(distance, medoids)
        price = to_all
        if cost == "members":
            same = cluster.unsqueeze(1) == cluster.unsqueeze(2)
            price = (distance * weight.unsqueeze(1) * same).sum(2)
        medoids = cheapest(price, cluster, medoids.shape[1])
    return medoids


def cheapest(price: Float[Tensor, "B L"], cluster: Int[Tensor, "B L"], count: int) -> Int[Tensor, "B M"]:
    """Return the member of lowest price of every cluster."""
    return first_least(price, cluster, count)


def nearest_medoid(distance: Float[Tensor, "B L L"], medoids: Int[Tensor, "B M"]) -> Int[Tensor, "B L"]:
    """Return the nearest medoid of every row, [B, L]; a medoid belongs to itself."""
    return gather_rows(distance, medoids).argmin(1).scatter(1, medoids, arange_like(medoids))
