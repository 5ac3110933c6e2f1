"""K-Medoids: keep n tokens that represent all others (Token Pooling: Marin et al., WACV 2023, arXiv:2110.03860).

Implemented as a baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers"
(ICCV Workshops 2023, arXiv:2308.04657). Before the block, on patch tokens only. The weight w_i of a token is the attention
it receives, over all heads and queries, in the block before. The n tokens of largest weight are the initial medoids; then,
``iterations`` times, every token joins the nearest medoid (L2) and the member i of lowest cost becomes the medoid of each
cluster. The medoids are kept unchanged, nothing is averaged; each medoid holds the patches of its cluster.

The cost in the published code is w_i times the sum of the distances to *all* tokens, so that among the members of a cluster
less attended tokens win; its weights were trained with that cost, and it is the default (``cost="published"``).
``cost="members"`` is the usual weighted K-medoids: the sum of w_j |x_i - x_j| over the members j.

Departures: with ``weights="equal"`` the published code starts from a random token; here the first medoid is the token
nearest to all, and each next one the farthest from its nearest medoid. A medoid always belongs to its own cluster.

The clustering needs all distances (and the attention of all pairs): O(N^2) memory, so it suits short sequences.
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

RECEIVED = "attention received before"  # per-token column [B, L]: of the block before, mean over heads and queries


class KMedoidsReducer(Reducer):
    """Select medoids with weights from the attention of the block before."""

    def __init__(self, iterations: int, cost: str) -> None:
        super().__init__()
        self.iterations, self.cost = iterations, cost

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        return tokens.replace(per_token={**tokens.per_token, RECEIVED: seen.received.detach()})

    def before(self, tokens: Tokens, n: int) -> Tokens:
        columns = dict(tokens.per_token)
        if RECEIVED not in columns:
            raise LookupError(
                "kmedoids: its weights are the attention received in the block before each reducing block, and there is none "
                "before the first; reduce at a later block (at=...), or pass weights='equal'"
            )
        weight = columns.pop(RECEIVED)
        distance = squared_distances(precise(tokens.patches.detach())).sqrt()
        medoids = medoids_of(distance, weight, topk_split(weight, n)[0], self.iterations, self.cost)
        return stand_for(tokens.replace(per_token=columns), distance, medoids)


class EqualKMedoidsReducer(Reducer):
    """Select medoids with equal weights, starting from medoids that are spread out."""

    def __init__(self, iterations: int, cost: str) -> None:
        super().__init__()
        self.iterations, self.cost = iterations, cost

    def before(self, tokens: Tokens, n: int) -> Tokens:
        distance = squared_distances(precise(tokens.patches.detach())).sqrt()
        medoids = medoids_of(distance, torch.ones_like(tokens.size), spread(distance, n), self.iterations, self.cost)
        return stand_for(tokens, distance, medoids)


def stand_for(tokens: Tokens, distance: Tensor, medoids: Tensor) -> Tokens:
    """Keep the medoids unchanged; each takes over the patches of the tokens nearest to it."""
    itself = torch.zeros_like(tokens.size).scatter(1, medoids, 1.0)
    return tokens.merge(nearest_medoid(distance, medoids), itself, medoids, complete=True)


@method(
    "kmedoids",
    title="K-Medoids: keep the tokens that stand for clusters",
    paper="2308.04657",
    phase="before",
    score="attention",
    score_detail="attention received",
    rest="merged",
    rest_detail="represented by the nearest medoid",
    trained=False,
    full_attention=True,
)
@dataclass(frozen=True)
class KMedoids(Method):
    """Options of ``kmedoids``.

    Args:
        iterations: rounds of assigning tokens to the nearest medoid and choosing the medoids again.
        weights: the ``attention`` received in the block before, or ``equal`` (the initial medoids are then spread out).
        cost: cost of a medoid: as ``published``, or the sum of the weighted distances to its ``members``.
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
