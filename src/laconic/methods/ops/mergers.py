"""BAT's mergers (arXiv:2211.11315): pairs of attentive tokens, and the groups of table 4 of the other tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like, places
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.clustering import density_peaks
from laconic.methods.ops.kmeans import lloyd
from laconic.methods.ops.matching import bipartite
from laconic.methods.ops.nearest import greedy_pairs, nearest
from laconic.methods.ops.pooling import cells, runs

Merger = Literal["dpc", "kmeans-1", "kmeans-3", "avg-pool", "max-pool", "spatial-pool"]
LLOYD = {"kmeans-1": 1, "kmeans-3": 3}  # iterations


def pair_up(
    x: Float[Tensor, "B K C"], pairs: int, matching: Literal["greedy", "bipartite"]
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B M"]]:
    """Return the new index of each row after fusing the most similar pairs, and the leading row of each new one.

    ``greedy`` takes the most similar disjoint pairs, ``bipartite`` matches odd to even rows in one pass.
    """
    rank = arange_like(x)
    if pairs == 0:
        return rank, rank
    if matching == "greedy":
        first, second = greedy_pairs(x, pairs)
    else:
        odd, _, even = bipartite(*nearest(x[:, 1::2], x[:, 0::2]), pairs)
        first, second = even * 2, odd * 2 + 1
    gone = torch.zeros_like(rank).scatter(1, second, 1)
    slot = rank - gone.cumsum(1)  # new index of a kept row
    return slot.scatter(1, second, slot.gather(1, first)), places(gone == 0, x.shape[1] - pairs)


def grouped(
    merger: Merger,
    tokens: Tokens,
    rest: Int[Tensor, "B R"],
    score: Float[Tensor, "B L"],
    count: int,
    grid: tuple[int, int],
    density: Literal["knn", "paper"],
    assign: Literal["denser", "nearest"],
) -> tuple[Int[Tensor, "B R"], Int[Tensor, "B Q"]]:
    """Return the group of each token of ``rest``, and the leading token of each of ``count`` groups (count 0: all -1)."""
    if count == 0:
        return torch.full_like(rest, -1), rest[:, :0]
    if count == 1:
        return torch.zeros_like(rest), torch.zeros_like(rest[:, :1])
    if merger == "dpc":
        return density_peaks(tokens.rows(rest), count, density, assign)
    if merger in LLOYD:
        return lloyd(tokens.rows(rest), score.gather(1, rest), arange_like(rest[:, :count]), LLOYD[merger])
    if merger == "spatial-pool":
        return cells(tokens.origin_index.gather(1, rest), grid, count)
    return runs(rest, count)
