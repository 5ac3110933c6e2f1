"""EViT + BAT (the row "EViT+Ours" of arXiv:2211.11315): EViT with BAT's merger in place of its packed token.

The paper does not give the details. Here the split is EViT's, clusters are attention-weighted sums that are not normalised
(as EViT packs), attentive pairs are fused, and as many tokens remain as in EViT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from laconic.core.method import BlockContext, Reducer, method
from laconic.methods.bat import MergeReducer
from laconic.methods.decouple import Decouple
from laconic.methods.ops import ScoreName


@method(
    "evit+bat",
    title="EViT with BAT's merger in the place of its packed token",
    paper="2211.11315",
    phase="between",
    score="class attention",
    rest="merged",
    rest_detail="density-peak clusters, summed as EViT does; attentive pairs fused",
    trained=False,
)
@dataclass(frozen=True)
class EViTBAT(Decouple):
    """Options of ``evit+bat``: those of ``bat``; clusters are attention-weighted sums, not normalised, as EViT packs."""

    weights: Literal["normalised", "literal", "literal-clusters"] = "literal-clusters"
    score: ScoreName = "class"

    def build(self, site: BlockContext) -> Reducer:
        return MergeReducer(self, self.score)
