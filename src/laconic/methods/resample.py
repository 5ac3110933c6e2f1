"""Shared options of the pooling methods: the tokens to pool (all, or the inattentive ones), and the number of pooled tokens.

BAT (Long et al., CVPR 2023, arXiv:2211.11315) compares its merger with average, max and spatial pooling, with convolution
and MLP sub-sampling and with k-means (table 4), but says neither what they pool nor into how many tokens; there is no code.
Both interpretations are available: ``all`` tokens, resampled to n; or only the ``inattentive``, which class attention (eq. 5)
separates from the attentive, which are kept unchanged. The second one, combined with BAT's fusing of attentive pairs, is
`bat(merger="avg-pool")` and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Method
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, ScoreName, by_place, runs, set_out, topk_split

Order = Literal["raster", "score"]


@dataclass(frozen=True)
class Pool(Method):
    """Shared options of all pooling methods.

    Args:
        pooled: ``all`` tokens into n, or only the ``inattentive`` into m, with the n - m most attentive kept.
        into: m: a count, or a fraction of the number of removed tokens; None: a tenth of it, but no more than half of the
            attentive plus one (BAT's own rule, see `laconic.methods.decouple`). Always at least 1 and at most n.
        score: the attention score of a token, if one is needed.
    """

    pooled: Literal["all", "inattentive"] = "all"
    into: int | float | None = None
    score: ScoreName = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.into is not None and (self.into <= 0 or (isinstance(self.into, float) and self.into > 1)):
            raise ValueError(f"{self.info.name}: into must be a count of at least 1 or a fraction in (0, 1], not {self.into!r}")

    def parts(self, before: int, n: int) -> tuple[int, int, int]:
        """Return (tokens kept unchanged, tokens to pool, pooled tokens) for ``before`` tokens of which n remain."""
        if self.pooled == "all":
            return 0, before, n
        if self.into is None:
            pooled = min(round(0.1 * (before - n)), (n + 2) // 3)
        else:
            pooled = self.into if isinstance(self.into, int) else round(self.into * (before - n))
        kept = n - min(n, max(1, pooled))
        return kept, before - kept, n - kept

    def scored(self, tokens: Tokens, seen: AttentionView) -> Tensor:
        """Return the score of each token."""
        return SCORES[self.score](tokens, seen)

    def part(self, tokens: Tokens, seen: AttentionView, n: int, order: Order) -> tuple[Tensor, Tensor]:
        """Return the indices of the kept tokens, by falling score, and of those to be pooled, in the given order.

        ``raster`` sorts the inattentive by position; if all tokens are pooled, they keep their order, which is the raster
        order at the start.
        """
        place, kept = arange_like(tokens.size), self.parts(len(tokens), n)[0]
        if self.pooled == "all" and order == "raster":
            return place[:, :0], place
        attentive, rest = topk_split(self.scored(tokens, seen), kept)
        return attentive, rest if order == "score" else by_place(tokens, rest)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before * (self.pooled == "inattentive")}


@dataclass(frozen=True)
class InSequence(Pool):
    """Shared options of the methods that pool along a sequence: those of `Pool`, and the order of the sequence.

    Args:
        order: ``raster``: by position; ``score``: by falling score, so that tokens of similar importance are pooled.
    """

    order: Order = "raster"

    def runs(self, tokens: Tokens, seen: AttentionView, n: int) -> tuple[Tensor, Tensor]:
        """Return (dst, lead) of `Tokens.merge` for runs of neighbours in the sequence."""
        kept, rest = self.part(tokens, seen, n, self.order)
        return set_out(kept, rest, *runs(rest, n - kept.shape[1]))

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before * (self.pooled == "inattentive" or self.order == "score")}
