"""BAT (arXiv:2211.11315): split tokens by class attention between attention and MLP, merge both parts (see `decouple`).

Training runs the same operation; there are no parameters and no losses of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.decouple import Decouple
from laconic.methods.ops import SCORES, ScoreName


class MergeReducer(Reducer):
    """Score by class attention, split the tokens, and merge both parts."""

    def __init__(self, config: Decouple, score: str) -> None:
        super().__init__()
        self.config, self.score = config, score

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return self.config.merge(tokens, SCORES[self.score](tokens, seen), n, self.site)


@method(
    "bat",
    title="BAT: fuse similar attentive tokens, cluster the inattentive",
    paper="2211.11315",
    phase="between",
    score="class attention",
    rest="merged",
    rest_detail="density-peak clusters; attentive pairs fused",
    trained=False,
)
@dataclass(frozen=True)
class BAT(Decouple):
    """Options of ``bat``: those of `Decouple`, and the attention score of a token."""

    score: ScoreName = "class"

    def build(self, site: BlockContext) -> Reducer:
        return MergeReducer(self, self.score)
