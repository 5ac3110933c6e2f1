"""Plain pooling, the simplest baselines (BAT, Long et al., CVPR 2023, arXiv:2211.11315, mergers of table 4).

The L tokens, in their order, are cut into n runs of as equal length as possible, and each run becomes its mean over patches
(``avg-pool``) or its element-wise maximum (``max-pool``), between attention and MLP. For tokens in raster order this is
pooling along the rows of the image; nothing is scored and nothing is learned. Optionally only the inattentive tokens are
pooled in this way (see `resample`).
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.resample import InSequence


class AvgPoolReducer(Reducer):
    """Average runs of neighbouring tokens, between attention and MLP."""

    def __init__(self, options: InSequence | None = None) -> None:
        super().__init__()
        self.options = AvgPool() if options is None else options

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        dst, lead = self.options.runs(tokens, seen, n)
        return tokens.merge(dst, None, lead, complete=True)


class MaxPoolReducer(Reducer):
    """Take the maximum of each channel over runs of neighbouring tokens, between attention and MLP."""

    def __init__(self, options: InSequence) -> None:
        super().__init__()
        self.options = options

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return tokens.merge_max(*self.options.runs(tokens, seen, n))


@method(
    "avg-pool",
    title="Average pooling: average neighbours",
    paper="2211.11315",
    phase="between",
    score="none",
    rest="merged",
    rest_detail="averaged with its neighbours",
    trained=False,
)
@dataclass(frozen=True)
class AvgPool(InSequence):
    """Options of ``avg-pool``: those of `InSequence`."""

    def build(self, site: BlockContext) -> Reducer:
        return AvgPoolReducer(self)


@method(
    "max-pool",
    title="Max pooling: the maximum of neighbours",
    paper="2211.11315",
    phase="between",
    score="none",
    rest="merged",
    rest_detail="maximum with its neighbours",
    trained=False,
)
@dataclass(frozen=True)
class MaxPool(InSequence):
    """Options of ``max-pool``: those of `InSequence`."""

    def build(self, site: BlockContext) -> Reducer:
        return MaxPoolReducer(self)
