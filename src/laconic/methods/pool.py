"""Plain pooling, the baseline without any idea: neighbours in the sequence are averaged (BAT, arXiv:2211.11315, table 4).

The L tokens, in their order, are cut into n runs of as equal length as can be, and each run becomes its mean over
patches. On a host's raster order that is pooling along rows; nothing is scored and nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.attention import Seen
from laconic.parts import share
from laconic.reducer import Method, Reducer, Site, method
from laconic.tokens import Tokens, iota


class AvgPoolReducer(Reducer):
    """Runs of neighbours, averaged between attention and MLP."""

    def between(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        dst = iota(tokens.size) * n // len(tokens)
        lead = (iota(tokens.size[:, :n]) * len(tokens) + n - 1) // n  # the first token of each run
        return tokens.merge(dst, share(tokens.size, dst, n), lead)


@method(
    "avg-pool",
    title="Average pooling: average neighbours",
    paper="2211.11315",
    moment="between",
    score="none",
    rest="averaged with its neighbours",
    trained=False,
)
@dataclass(frozen=True)
class AvgPool(Method):
    """``avg-pool`` has no options."""

    def build(self, site: Site) -> Reducer:
        return AvgPoolReducer()
