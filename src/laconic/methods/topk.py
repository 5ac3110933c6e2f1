"""Plain pruning: keep the tokens of highest score, drop the rest. Baselines that every other method must beat.

``topk`` is EViT (Liang et al., ICLR 2022, arXiv:2202.07800) without its fused token, and the Top-K row of Haurum et al.
(ICCVW 2023, arXiv:2308.04657). ``random`` keeps arbitrary tokens: a fixed pseudo-random score for every position and seed,
the same for all images, so that a run can be repeated and no image depends on the other images of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Method, Prune, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, ScoreName, arbitrary, topk_split


def drop(tokens: Tokens, score: Tensor, n: int) -> Tokens:
    """Keep the n tokens of highest score, by falling score."""
    return tokens.keep(topk_split(score, n)[0])


@method(
    "topk",
    title="Top-K: keep the most attended tokens",
    paper="2202.07800",
    phase="between",
    score="class attention",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class TopK(Method):
    """Options of ``topk``: the score of a token, ``class`` attention or (without a class token) that of the ``mean-query``."""

    score: ScoreName = "class"

    def build(self, site: BlockContext) -> Reducer:
        return Prune(SCORES[self.score], drop, reads="class" if self.score == "class" else "anywhere")

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before}


class ArbitraryPrune(Reducer):
    """Keep arbitrary tokens, between attention and MLP like other methods, so that the work is the same."""

    reads = "class"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return tokens.keep(topk_split(arbitrary(tokens, self.seed), n)[0])


@method(
    "random",
    title="Random: keep arbitrary tokens",
    paper="2308.04657",
    phase="between",
    score="none",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class Random(Method):
    """Options of ``random``: the seed of the draw."""

    seed: int = 0

    def build(self, site: BlockContext) -> Reducer:
        return ArbitraryPrune(self.seed * 1009 + site.ordinal)
