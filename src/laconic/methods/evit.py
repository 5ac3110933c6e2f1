"""EViT: Expediting Vision Transformers via Token Reorganizations (Liang et al., ICLR 2022, arXiv:2202.07800).

Between attention and MLP, keep the K = ceil(rate * N) tokens the class token attends to most (mean over heads, eq. 4) and
pack the inattentive ones into one more token, x_f = sum of a_i x_i (eq. 5). As in the published code the sum is not
normalised, gradients flow through the attention, and the packed token is an ordinary token from then on.

Departure: if all tokens but one would be kept (a rate just below 1), the counts before and after are the same, and nothing is
done; the published code scales that single token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Method, Prune, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, ScoreName, scatter_back, shuffled, topk_split
from laconic.methods.topk import drop


def pack(tokens: Tokens, score: Tensor, n: int) -> Tokens:
    """Keep the n - 1 highest scores, by falling score, then the packed token, at the position of the best of the rest."""
    kept, rest = topk_split(score, n - 1)
    dst = scatter_back(kept, rest, arange_like(kept), torch.full_like(rest, n - 1))
    weight = score.scatter(1, kept, 1.0)
    return tokens.merge(dst, weight, torch.cat([kept, rest[:, :1]], 1), complete=True)


def _at_random(score: str, seed: int, tokens: Tokens, seen: AttentionView) -> Tensor:
    return shuffled(SCORES[score](tokens, seen), tokens, seed)


@method(
    "evit",
    title="EViT: pack the inattentive tokens into one",
    paper="2202.07800",
    phase="between",
    score="class attention",
    rest="merged",
    rest_detail="packed into one token",
    trained=False,
)
@dataclass(frozen=True)
class EViT(Method):
    """Options of ``evit``: pack the rest into one token (``fuse``) or drop it, and the attention score of a token.

    ``policy="random"`` permutes the scores among the tokens at random, by ``seed`` (an ablation of the TPS paper).
    """

    fuse: bool = True
    score: ScoreName = "class"
    policy: Literal["original", "random"] = "original"
    seed: int = 0

    def build(self, site: BlockContext) -> Reducer:
        score = SCORES[self.score]
        if self.policy == "random":
            score = partial(_at_random, self.score, self.seed * 1009 + site.ordinal)
        if self.fuse:
            return Prune(score, pack)
        return Prune(score, drop, reads="class" if self.score == "class" else "anywhere")

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return math.ceil(rates[-1] * n) + self.fuse

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before, "elementwise": site.dim * (before - after + 1) if self.fuse else 0}
