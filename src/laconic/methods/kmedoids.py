"""K-Medoids: keep n tokens that stand for all (Token Pooling: Marin et al., WACV 2023, arXiv:2110.03860).

Followed as a baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers"
(ICCV Workshops 2023, arXiv:2308.04657). Before the block, on patch tokens alone. The weight w_i of a token is the attention
it receives, over all heads and queries, in the block before. The n tokens of largest weight are the first medoids; then,
``iterations`` times, every token joins the nearest medoid (L2) and every cluster takes the member i of least cost as its
medoid. The medoids leave as they are, nothing is averaged; the patches of a cluster count as theirs.

The cost of the published code is w_i times the sum of the distances to *all* tokens, so that among members the less
attended win; its weights were trained with that, and it is the default (``cost="published"``). ``cost="members"`` is
weighted K-medoids as it is meant: the sum of w_j |x_i - x_j| over the members j.

Departures: with ``weights="equal"`` the published code starts from a random token; here the first medoid is the token
nearest to all, and each next one the farthest from its nearest medoid. A medoid always belongs to its own cluster.

It is defined by all distances (and the attention of all pairs): memory O(N^2), so it is for short sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.ops import medoids_of, nearest_medoid, precise, spread, squared_distances, topk_split

RECEIVED = "attention received before"  # column [B, L]: of the block before, mean over heads and queries


class KMedoidsReducer(Reducer):
    """Weighted K-medoids with weights from the block before."""

    def __init__(self, iterations: int, cost: str) -> None:
        super().__init__()
        self.iterations, self.cost = iterations, cost

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        return tokens.replace(per_token={**tokens.per_token, RECEIVED: seen.received.detach()})

    def before(self, tokens: Tokens, n: int) -> Tokens:
        columns = dict(tokens.per_token)
        if RECEIVED not in columns:
            raise LookupError(
                "kmedoids: its weights are the attention received in the block before the one it reduces at, and there is none "
                "before the first; reduce at a later block (at=...), or pass weights='equal'"
            )
        weight = columns.pop(RECEIVED)
        distance = squared_distances(precise(tokens.patches.detach())).sqrt()
        medoids = medoids_of(distance, weight, topk_split(weight, n)[0], self.iterations, self.cost)
        return stand_for(tokens.replace(per_token=columns), distance, medoids)


class EqualKMedoidsReducer(Reducer):
    """K-medoids with equal weights; the first medoids are spread out."""

    def __init__(self, iterations: int, cost: str) -> None:
        super().__init__()
        self.iterations, self.cost = iterations, cost

    def before(self, tokens: Tokens, n: int) -> Tokens:
        distance = squared_distances(precise(tokens.patches.detach())).sqrt()
        medoids = medoids_of(distance, torch.ones_like(tokens.size), spread(distance, n), self.iterations, self.cost)
        return stand_for(tokens, distance, medoids)


def stand_for(tokens: Tokens, distance: Tensor, medoids: Tensor) -> Tokens:
    """The medoids as they are, with the patches of those that are nearest to them."""
    itself = torch.zeros_like(tokens.size).scatter(1, medoids, 1.0)
    return tokens.merge(nearest_medoid(distance, medoids), itself, medoids)


@method(
    "kmedoids",
    title="K-Medoids: keep the tokens that stand for clusters",
    paper="2308.04657",
    phase="before",
    score="attention received",
    rest="represented by the nearest medoid",
    trained=False,
    full_attention=True,
)
@dataclass(frozen=True)
class KMedoids(Method):
    """Options of ``kmedoids``.

    Args:
        iterations: rounds of joining the nearest medoid and choosing the medoids again.
        weights: the ``attention`` received in the block before, or ``equal`` (then the start is spread out, step by step).
        cost: of a medoid: as ``published``, or the weighted distances to its ``members``.
    """

    iterations: int = 3
    weights: Literal["attention", "equal"] = "attention"
    cost: Literal["published", "members"] = "published"

    def build(self, site: BlockContext) -> Reducer:
        kind = KMedoidsReducer if self.weights == "attention" else EqualKMedoidsReducer
        return kind(self.iterations, self.cost)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"pairwise": before * before * site.dim}
