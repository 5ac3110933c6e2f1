"""k-means: merge clusters of similar tokens (a merger in table 4 of BAT, CVPR 2023, arXiv:2211.11315, with 1 and 3 iterations).

Between attention and MLP, Lloyd's algorithm on the tokens' features: assign every token to the nearest centre, move every
centre to the mean of its tokens, ``iterations`` times; then each cluster becomes its mean, the sum of s_j z_j over the sum of
s_j, as in eq. 8.

The paper does not say how centres are initialised, nor how a cluster is averaged; there is no code. Here nothing is random:
centres start at the tokens of highest score, or evenly spread over the image, and the same weights are used for the centres
and the merged tokens, so that the weighted sum of squared distances decreases. No cluster is empty (see
`laconic.methods.ops.kmeans`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import group_normalize, lloyd, set_out, strided
from laconic.methods.resample import Order, Pool


class KMeansReducer(Reducer):
    """Cluster tokens by k-means and average each cluster, between attention and MLP."""

    def __init__(self, options: KMeans) -> None:
        super().__init__()
        self.options = options

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        options, weight = self.options, tokens.size
        if options.weights == "importance":
            weight = options.scored(tokens, seen)
        elif options.weights == "even":
            weight = torch.ones_like(tokens.size)
        order: Order = "score" if options.init == "top-score" else "raster"
        kept, rest = options.part(tokens, seen, n, order)
        clusters = n - kept.shape[1]
        first = arange_like(rest[:, :clusters]) if options.init == "top-score" else strided(rest, clusters)
        found = lloyd(tokens.rows(rest), weight.gather(1, rest), first, options.iterations)
        dst, lead = set_out(kept, rest, *found)
        return tokens.merge(dst, group_normalize(weight, dst, n, complete=True), lead, complete=True)


@method(
    "kmeans",
    title="k-means: merge clusters of tokens",
    paper="2211.11315",
    phase="between",
    score="class attention",
    rest="merged",
    rest_detail="k-means clusters",
    trained=False,
)
@dataclass(frozen=True)
class KMeans(Pool):
    """Options of ``kmeans``: those of `Pool`, and of the clustering.

    Args:
        iterations: iterations of Lloyd's algorithm; the paper uses 1 and 3.
        init: initial centres: the tokens of highest score (``top-score``), or evenly spread in raster order (``strided``).
        weights: weights of the means: ``importance`` (the score, as in BAT's eq. 8), ``size`` (patches held) or ``even``.
    """

    iterations: int = 3
    init: Literal["top-score", "strided"] = "top-score"
    weights: Literal["importance", "size", "even"] = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"kmeans: iterations must be at least 1, not {self.iterations!r}")

    def build(self, site: BlockContext) -> Reducer:
        return KMeansReducer(self)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        _, rest, clusters = self.parts(before, after)
        scored = self.pooled == "inattentive" or self.init == "top-score" or self.weights == "importance"
        return {"pairwise": self.iterations * rest * clusters * site.dim, "head_mean": before * scored}
