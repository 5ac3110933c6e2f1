"""Exact agglomerative clustering of a whole batch; shapes depend only on counts, not on the data."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like
from laconic.core.shape_types import Float, Int

Linkage = Literal["average", "complete", "single"]
_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


def agglomerate(distance: Float[Tensor, "B M M"], count: int, linkage: Linkage = "average") -> Int[Tensor, "B M"]:
    """Merge the two nearest clusters until ``count`` are left; return each row's cluster, numbered in order of first rows.

    The distance of two clusters is the mean (``average``), the largest (``complete``) or the smallest (``single``) between
    their members, updated by the Lance-Williams formulas: one merge per step, in all images at once. Of equally near pairs
    the first in row order is merged.
    """
    # compiling all unrolled steps takes minutes: for torch.compile they are one operator (an export contains all steps)
    whole = torch.compiler.is_compiling() and not _exporting()
    return _operator(distance.detach(), count, linkage) if whole else _agglomerate(distance.detach(), count, linkage)


def _agglomerate(distance: Tensor, count: int, linkage: str) -> Tensor:
    batch, rows, _ = distance.shape
    own, image = arange_like(distance), torch.arange(batch, device=distance.device)
    # a cluster is stored in the row of its first member; all other rows, and the diagonal, are at infinite distance.
    # Distances are negated, because the largest of a row is found faster than the smallest
    upper = -distance.float().triu(1)
    near = (upper + upper.transpose(1, 2)).masked_fill(own.unsqueeze(1) == own.unsqueeze(2), -math.inf)
    cluster, size = own.clone(), torch.ones_like(near[:, 0])
    for _ in range(rows - count):
        first = near.amax(2).argmax(1)
        row = near[image, first]
        second = row.argmax(1)  # first < second: argmax returns the first of the pair's two equal rows
        row = _between(row, near[image, second], size[image, first], size[image, second], linkage)
        row = row.scatter(1, first.unsqueeze(1), -math.inf)
        near[image, first], near[image, :, first] = row, row
        near[image, second], near[image, :, second] = -math.inf, -math.inf
        size = size.scatter_add(1, first.unsqueeze(1), size.gather(1, second.unsqueeze(1)))
        cluster = torch.where(cluster == second.unsqueeze(1), first.unsqueeze(1), cluster)
    number = (cluster == own).cumsum(1) - 1
    return number.gather(1, cluster)


def _between(a: Tensor, b: Tensor, size_a: Tensor, size_b: Tensor, linkage: str) -> Tensor:
    """Return the negative distances of the union of two clusters to all others."""
    if linkage == "average":
        share = (size_a / (size_a + size_b)).unsqueeze(1)
        return a * share + b * (1 - share)
    return torch.minimum(a, b) if linkage == "complete" else torch.maximum(a, b)


_operator = torch.library.custom_op(
    "laconic::agglomerate", _agglomerate, mutates_args=(), schema="(Tensor distance, int count, str linkage) -> Tensor"
)


@_operator.register_fake
def _shape(distance: Tensor, count: int, linkage: str) -> Tensor:
    return distance.new_empty(distance.shape[:2], dtype=torch.int64)
