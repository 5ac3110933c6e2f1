"""eTPS (arXiv:2304.10716): score by class attention inside a block, keep ceil(rate * N), squeeze the rest (see `squeeze`).

Training runs the same operation; the loss adds logit distillation from the unreduced model. There is no published code of
eTPS: this is the composition that its authors describe, and its cost matches theirs in every digit.
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, ScoreName, arbitrary
from laconic.methods.squeeze import Squeeze


class ETPSReducer(Reducer):
    """Score by class attention, then squeeze."""

    def __init__(self, config: ETPS, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        random = self.config.policy == "random"
        score = arbitrary(tokens, self.seed) if random else SCORES[self.config.score](tokens, seen)
        return self.config.squeeze(tokens, seen, score, n)


@method(
    "etps",
    title="eTPS: prune by class attention, squeeze the rest into their hosts",
    paper="2304.10716",
    phase="between",
    score="class attention",
    rest="squeezed",
    rest_detail="squeezed into the most similar kept token",
    trained=False,
)
@dataclass(frozen=True)
class ETPS(Squeeze):
    """Options of ``etps``: those of `Squeeze`, and the attention score of a token."""

    score: ScoreName = "class"

    def build(self, site: BlockContext) -> Reducer:
        return ETPSReducer(self, self.seed * 1009 + site.ordinal)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {**self.squeeze_macs(before, after, site.dim), "head_mean": before}
