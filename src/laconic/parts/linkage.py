"""Agglomerative clustering of a whole batch, exactly, with shapes that depend on counts alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from laconic.shapes import Float, Int
from laconic.tokens import iota

Linkage = Literal["average", "complete", "single"]


def agglomerate(distance: Float[Tensor, "B M M"], count: int, linkage: Linkage = "average") -> Int[Tensor, "B M"]:
    """Merge the two nearest clusters until ``count`` are left: the cluster of each row, numbered by their first rows.

    The distance of two clusters is the mean (``average``), the largest (``complete``) or the smallest (``single``) between
    their members, kept up by the Lance-Williams formulas: one merge a step, in all images at once. Of equally near pairs
    the first is taken, row by row.
    """
    batch, rows, _ = distance.shape
    everyone, image = iota(distance), torch.arange(batch, device=distance.device)
    # a cluster lives in the row of its first member; the others, and the diagonal, are infinitely far
    upper = distance.detach().float().triu(1)
    apart = (upper + upper.transpose(1, 2)).masked_fill(everyone.unsqueeze(1) == everyone.unsqueeze(2), math.inf)
    cluster, size = everyone.clone(), torch.ones_like(apart[:, 0])
    for _ in range(rows - count):
        first = apart.amin(1).argmin(1)  # by columns, which is quicker; the matrix is symmetric
        row = apart[image, first]
        second = row.argmin(1)  # first < second, for the upper triangle comes first
        row = _between(row, apart[image, second], size[image, first], size[image, second], linkage)
        row = row.scatter(1, first.unsqueeze(1), math.inf)
        apart[image, first], apart[image, :, first] = row, row
        apart[image, second], apart[image, :, second] = math.inf, math.inf
        size = size.scatter_add(1, first.unsqueeze(1), size.gather(1, second.unsqueeze(1)))
        cluster = torch.where(cluster == second.unsqueeze(1), first.unsqueeze(1), cluster)
    number = (cluster == everyone).cumsum(1) - 1
    return number.gather(1, cluster)


def _between(a: Tensor, b: Tensor, size_a: Tensor, size_b: Tensor, linkage: Linkage) -> Tensor:
    """Distances of the union of two clusters to all others."""
    if linkage == "average":
        share = (size_a / (size_a + size_b)).unsqueeze(1)
        return a * share + b * (1 - share)
    return torch.maximum(a, b) if linkage == "complete" else torch.minimum(a, b)
