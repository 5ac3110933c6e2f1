"""Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph (Wang et al., CVPR 2024, arXiv:2305.17328).

Between attention and MLP, without training. The attention matrix A of a head is the adjacency matrix of a graph of tokens,
and the importance of a token is its weighted PageRank (their algorithm 1): s starts uniform and becomes A^T s, some rounds
long. Heads are combined by the root mean square over those whose scores have a variance in [0.01, 0.7] (emphasis of
informative regions and variance-based head filter). A block drops tokens in three stages:

I'  score all tokens;
S   sort them by importance and part them alternately: every second token is compared with those of the other group by the
    cosine of its key (mean over heads), and the tokens with the most similar match are dropped, since the kept group holds
    the more important token of each pair of ranks;
I   score the tokens that remain on the graph without the dropped ones, and drop the least important.

Departures: the paper gives no single share of tokens for stage S, here it is an option; variances are of scores scaled to a
mean of 1, since the thresholds fit no other scale; where no head passes the filter all heads count. Rounds follow the paper's
ranges: 30 in the first third of the depth, 5 in the second, 1 in the last. There is no published code to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import gather_rows
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import nearest, require, topk_split

ROUNDS = (30, 5, 1)  # of the PageRank, by thirds of the depth
VARIANCES = (0.01, 0.7)


def page_rank(matrix: Float[Tensor, "B H N N"], there: Float[Tensor, "B N"], rounds: int) -> Float[Tensor, "B N"]:
    """Return the importance of each token that is ``there`` (1, or 0 for a dropped token): its rank, combined over heads."""
    count = there.sum(1, keepdim=True)
    graph = matrix * there[:, None, None, :]
    graph = graph / graph.sum(3, keepdim=True).clamp_min(torch.finfo(graph.dtype).tiny)
    ranks = (there / count).unsqueeze(1).expand(-1, matrix.shape[1], -1)  # [B, H, N]
    for _ in range(rounds):
        ranks = (ranks.unsqueeze(2) @ graph).squeeze(2)
        ranks = ranks * there.unsqueeze(1)
    scaled = ranks * count.unsqueeze(1)  # with a mean of 1
    variance = ((scaled - 1).square() * there.unsqueeze(1)).sum(2) / count
    informative = ((variance >= VARIANCES[0]) & (variance <= VARIANCES[1])).to(ranks.dtype)
    informative = torch.where(informative.any(1, keepdim=True), informative, 1.0).unsqueeze(2)
    return ((scaled.square() * informative).sum(1) / informative.sum(1)).sqrt()


class ZeroTPruneReducer(Reducer):
    """Drop similar tokens, then unimportant ones."""

    def __init__(self, similar: float, rounds: int) -> None:
        super().__init__()
        self.similar, self.rounds = similar, rounds

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        matrix, prefix, length = seen.matrix, tokens.prefix, len(tokens)
        redundant = min(int(self.similar * (length - n)), length // 2)
        there = torch.ones_like(matrix[:, 0, 0])
        if redundant:
            importance = page_rank(matrix, there, self.rounds)[:, prefix:]
            dropped = self._redundant(seen.keys, importance, redundant)
            there = there.scatter(1, dropped + prefix, 0.0)
        importance = page_rank(matrix, there, self.rounds).masked_fill(there == 0, -1.0)[:, prefix:]
        return tokens.keep(topk_split(importance, n)[0])

    @staticmethod
    def _redundant(keys: Tensor, importance: Float[Tensor, "B L"], count: int) -> Int[Tensor, "B R"]:
        """Return the ``count`` tokens of every second rank whose keys are the most similar to one of the other ranks."""
        order, _ = topk_split(importance, importance.shape[1])
        kept, candidates = order[:, ::2], order[:, 1::2]
        similarity, _ = nearest(gather_rows(keys, candidates), gather_rows(keys, kept))
        return candidates.gather(1, topk_split(similarity, count)[0])


@method(
    "zero-tprune",
    title="Zero-TPrune: prune by PageRank on attention, and by similarity",
    paper="2305.17328",
    phase="between",
    score="attention",
    score_detail="PageRank of the attention graph, key similarity",
    rest="dropped",
    trained=False,
    full_attention=True,
)
@dataclass(frozen=True)
class ZeroTPrune(Method):
    """Options of ``zero-tprune``.

    Args:
        similar: share of the tokens to drop that is dropped for similarity (at most half of the tokens); the others are
            dropped for low importance.
        rounds: rounds of the PageRank in every block; 0 takes 30, 5 and 1 by thirds of the depth.
    """

    similar: float = 0.5
    rounds: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("zero-tprune", "similar", self.similar, 0 <= self.similar <= 1, "is a share, from 0 to 1")

    def build(self, site: BlockContext) -> Reducer:
        return ZeroTPruneReducer(self.similar, self._rounds(site))

    def _rounds(self, site: BlockContext) -> int:
        return self.rounds or ROUNDS[min(2, 3 * site.block // max(1, site.depth))]

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        tokens, half = before + 1, before // 2
        ranks = 2 * self._rounds(site) * site.heads * tokens**2
        return {"matmul": site.dim * tokens**2 + ranks + half * (before - half) * (site.dim // site.heads)}
