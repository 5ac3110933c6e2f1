"""Spatial pooling: average cells of the image (a merger in table 4 of BAT, CVPR 2023, arXiv:2211.11315).

Between attention and MLP the grid of patches is cut into h' x w' cells, like an adaptive average pool with windows that do
not overlap, and each cell becomes the mean over its patches, wherever they are in the sequence. Missing patches (holes) are
not counted.

The paper does not say more; there is no code. Exactly n tokens have to remain, so h' x w' is the largest such grid of at most
n cells (none more than twice as long as wide), and the difference to n, including cells in holes, is made up by splitting the
fullest cells (see `laconic.methods.ops.cells`). 14 x 14 patches at keep rate 0.5 are 7 x 14 cells, then 7 x 7, then 5 x 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import cells, grid_of, set_out
from laconic.methods.resample import Pool


class SpatialPoolReducer(Reducer):
    """Average the tokens of each cell of the grid, between attention and MLP."""

    def __init__(self, options: Pool) -> None:
        super().__init__()
        self.options = options

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        grid = grid_of("spatial-pool", tokens)
        kept, rest = self.options.part(tokens, seen, n, "raster")
        group, first = cells(tokens.origin_index.gather(1, rest), grid, n - int(kept.shape[1]))
        dst, lead = set_out(kept, rest, group, first)
        return tokens.merge(dst, None, lead, complete=True)


@method(
    "spatial-pool",
    title="Spatial pooling: average cells of the image",
    paper="2211.11315",
    phase="between",
    score="none",
    rest="merged",
    rest_detail="averaged with its cell of the grid",
    trained=False,
)
@dataclass(frozen=True)
class SpatialPool(Pool):
    """Options of ``spatial-pool``: those of `Pool`."""

    def build(self, site: BlockContext) -> Reducer:
        return SpatialPoolReducer(self)
