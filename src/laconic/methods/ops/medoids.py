"""K-medoids on a matrix of distances, of all images at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.core.gather import arange_like, first_least, gather_rows
from laconic.core.shape_types import Float, Int


def spread(distance: Float[Tensor, "B L L"], count: int) -> Int[Tensor, "B M"]:
    """The row nearest to all others, then again and again the one farthest from its nearest so far, [B, count]."""
    chosen = [distance.sum(2).argmin(1, keepdim=True)]
    reach = torch.full_like(distance[:, 0], math.inf)
    for _ in range(count - 1):
        reach = torch.minimum(reach, gather_rows(distance, chosen[-1]).squeeze(1))
        reach = reach.scatter(1, chosen[-1], -1.0)  # less than 0: of equal rows none is taken twice
        chosen.append(reach.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def medoids_of(
    distance: Float[Tensor, "B L L"], weight: Float[Tensor, "B L"], medoids: Int[Tensor, "B M"], iterations: int, cost: str
) -> Int[Tensor, "B M"]:
    """The medoids after so many rounds of joining and choosing."""
    to_all = weight * distance.sum(2)
    for _ in range(iterations):
        cluster = nearest_medoid(distance, medoids)
        price = to_all
        if cost == "members":
            fellows = cluster.unsqueeze(1) == cluster.unsqueeze(2)
            price = (distance * weight.unsqueeze(1) * fellows).sum(2)
        medoids = cheapest(price, cluster, medoids.shape[1])
    return medoids


def cheapest(price: Float[Tensor, "B L"], cluster: Int[Tensor, "B L"], count: int) -> Int[Tensor, "B M"]:
    """The member of least price of every cluster."""
    return first_least(price, cluster, count)


def nearest_medoid(distance: Float[Tensor, "B L L"], medoids: Int[Tensor, "B M"]) -> Int[Tensor, "B L"]:
    """The nearest medoid of every row; a medoid's is itself, [B, L]."""
    return gather_rows(distance, medoids).argmin(1).scatter(1, medoids, arange_like(medoids))
