"""dTPS (arXiv:2304.10716): DynamicViT's predictor before a block, keep int(N0 * rate^stage), squeeze the rest (see `squeeze`).

Training keeps the number of tokens: decisions are Gumbel-sampled, hosts are fused softly with straight-through gradients,
pruned tokens are masked afterwards. Losses: "ratio" as in DynamicViT, and distillation of logits and (by KL) of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.dynamicvit import LearnedPrune, predictor_macs
from laconic.methods.ops import arbitrary, by_stage
from laconic.methods.squeeze import NOTED, Squeeze


class WatchingPrune(LearnedPrune):
    """`LearnedPrune` that records the attention of the block before."""

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        return tokens.replace(per_token={**tokens.per_token, NOTED: seen.rows(arange_like(tokens.size))})


@method(
    "dtps",
    title="dTPS: prune by a learned score, squeeze the rest into their hosts",
    paper="2304.10716",
    phase="before",
    score="learned",
    score_detail="learned predictor",
    rest="squeezed",
    rest_detail="squeezed into the most similar kept token",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class DTPS(Squeeze):
    """Options of ``dtps``: those of `Squeeze` (the random policy has an effect at inference only)."""

    def build(self, site: BlockContext) -> Reducer:
        seed = self.seed * 1009 + site.ordinal
        kind = LearnedPrune if self.similarity == "cosine" else WatchingPrune
        return kind(site.dim, partial(self._hard, seed), self._soft)

    def _hard(self, seed: int, tokens: Tokens, score: Tensor, n: int) -> Tokens:
        score = arbitrary(tokens, seed) if self.policy == "random" else score
        return _forget(self.squeeze(tokens, None, score, n))

    def _soft(self, tokens: Tokens, keep: Tensor, gone: Tensor) -> Tokens:
        return _forget(self.soft_squeeze(tokens, keep, gone))

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return dict(Counter(predictor_macs(before, site.dim)) + Counter(self.squeeze_macs(before, after, site.dim)))

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        return by_stage(weights, at, "score_predictor", "predictor.")


def _forget(tokens: Tokens) -> Tokens:
    return tokens.replace(per_token={name: c for name, c in tokens.per_token.items() if name != NOTED})
