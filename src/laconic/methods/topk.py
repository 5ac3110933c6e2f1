"""Plain pruning: keep the tokens of highest score, drop the rest. The baselines every other method must beat.

``topk`` is EViT (Liang et al., ICLR 2022, arXiv:2202.07800) without its fused token, and the Top-K row of Haurum et al.
(ICCVW 2023, arXiv:2308.04657). ``random`` keeps arbitrary tokens: a fixed draw for every position and seed, the same for
all images, so that a run can be repeated and no image depends on its batch-mates.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laconic.attention import Seen
from laconic.parts import SCORES, ScoreName, arbitrary, split
from laconic.reducer import Method, Prune, Reducer, Site, method
from laconic.tokens import Tokens


def drop(tokens: Tokens, score: Tensor, n: int) -> Tokens:
    """Keep the n highest scores, by falling score."""
    return tokens.keep(split(score, n)[0])


@method(
    "topk",
    title="Top-K: keep the most attended tokens",
    paper="2202.07800",
    moment="between",
    score="class attention",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class TopK(Method):
    """Options of ``topk``: what scores a token, ``class`` attention or (without class token) the ``mean-query``'s."""

    score: ScoreName = "class"

    def build(self, site: Site) -> Reducer:
        return Prune(SCORES[self.score], drop, looks="class" if self.score == "class" else "anywhere")

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        return {"head_mean": before}


class ArbitraryPrune(Reducer):
    """Keep arbitrary tokens, between attention and MLP like the others, so that the work is the same."""

    looks = "class"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def between(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        return tokens.keep(split(arbitrary(tokens, self.seed), n)[0])


@method(
    "random",
    title="Random: keep arbitrary tokens",
    paper="2308.04657",
    moment="between",
    score="none",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class Random(Method):
    """Options of ``random``: the seed of the draw."""

    seed: int = 0

    def build(self, site: Site) -> Reducer:
        return ArbitraryPrune(self.seed * 1009 + site.stage)
