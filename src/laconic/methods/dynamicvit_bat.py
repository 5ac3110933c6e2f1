"""DynamicViT + BAT (the row "DyViT+Ours" of arXiv:2211.11315): BAT's merger with DynamicViT's learned score, before a block.

The paper does not give the details. Here the attentive tokens are the int(N0 * rate^stage) tokens most likely to be kept, the
probability of being kept is the weight of eq. 8, and training really removes tokens, with straight-through gradients to the
score; no ratio loss, distillation of logits and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.decouple import Decouple
from laconic.methods.dynamicvit import predictor_macs
from laconic.methods.ops import Predictor, by_stage


class LearnedMerge(Reducer):
    """Score tokens by a predictor before the block, then split and merge them; straight-through gradients to the score."""

    def __init__(self, config: DynamicViTBAT, site: BlockContext) -> None:
        super().__init__()
        self.config = config
        self.predictor = Predictor(site.dim)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        score = self.predictor(tokens.patches)[..., 0].exp()
        # factor 1 with the gradient of the score: tokens that are not merged would otherwise give the predictor no gradient
        through = (1 + score - score.detach()).unsqueeze(-1).to(tokens.x.dtype)
        x = torch.cat([tokens.x[:, : tokens.prefix], tokens.patches * through], 1) if self.training else tokens.x
        return self.config.merge(tokens.replace(x=x), score, n, self.site)


@method(
    "dynamicvit+bat",
    title="DynamicViT's learned score with BAT's merger",
    paper="2211.11315",
    phase="before",
    score="learned",
    score_detail="learned predictor",
    rest="merged",
    rest_detail="density-peak clusters; attentive pairs fused",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class DynamicViTBAT(Decouple):
    """Options of ``dynamicvit+bat``: those of ``bat``. int(N0 * rate^stage) tokens are attentive; training removes tokens."""

    def build(self, site: BlockContext) -> Reducer:
        return LearnedMerge(self, site)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return self.count(min(n, max(1, of_the_initial(rates, n, patches))), n, len(rates) - 1, rates[-1])

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {**predictor_macs(before, site.dim), "pairwise": super().macs(before, after, site)["pairwise"]}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        return by_stage(weights, at, "score_predictor", "predictor.")
