"""What the pooling methods share: whether all tokens are pooled or the inattentive only, and how many become how many.

BAT (Long et al., CVPR 2023, arXiv:2211.11315) compares its merger with average, max and spatial pooling, with convolution
and MLP sub-sampling and with k-means (table 4), but says neither what they pool nor into how many; there is no code. Both
readings are offered: ``all`` tokens, resampled to n; or only the ``inattentive``, once class attention (eq. 5) has parted
them from the attentive, which stay as they are. The second one with BAT's fusing of attentive pairs beside it is
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
    """What all the pooling methods share.

    Args:
        pooled: ``all`` tokens into n, or only the ``inattentive`` into m, where the n - m most attentive stay.
        into: m: a count, or a fraction of the tokens that leave; None: a tenth of them, but no more than half of the
            attentive and one (BAT's own rule, see `laconic.methods.decouple`). Always at least 1 and at most n.
        score: what scores a token, where that is needed.
    """

    pooled: Literal["all", "inattentive"] = "all"
    into: int | float | None = None
    score: ScoreName = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.into is not None and (self.into <= 0 or (isinstance(self.into, float) and self.into > 1)):
            raise ValueError(f"{self.info.name}: into must be a count of at least 1 or a fraction in (0, 1], not {self.into!r}")

    def parts(self, before: int, n: int) -> tuple[int, int, int]:
        """Of ``before`` tokens: how many stay as they are, how many are pooled, and into how many; n are left."""
        if self.pooled == "all":
            return 0, before, n
        if self.into is None:
            pooled = min(round(0.1 * (before - n)), (n + 2) // 3)
        else:
            pooled = self.into if isinstance(self.into, int) else round(self.into * (before - n))
        kept = n - min(n, max(1, pooled))
        return kept, before - kept, n - kept

    def scored(self, tokens: Tokens, seen: AttentionView) -> Tensor:
        """The score of each token."""
        return SCORES[self.score](tokens, seen)

    def part(self, tokens: Tokens, seen: AttentionView, n: int, order: Order) -> tuple[Tensor, Tensor]:
        """Indices of the tokens that stay, by falling score, and of those to be pooled, in this order.

        ``raster`` is by place, of the inattentive; all tokens are taken as they come, which is the raster to begin with.
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
    """What the methods that pool along a sequence share: those of `Pool`, and which sequence.

    Args:
        order: ``raster``: by place; ``score``: by falling score, so that tokens of like importance are pooled.
    """

    order: Order = "raster"

    def runs(self, tokens: Tokens, seen: AttentionView, n: int) -> tuple[Tensor, Tensor]:
        """(dst, lead) for runs of neighbours in the sequence."""
        kept, rest = self.part(tokens, seen, n, self.order)
        return set_out(kept, rest, *runs(rest, n - kept.shape[1]))

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before * (self.pooled == "inattentive" or self.order == "score")}
