"""Fixed patterns: keep the patches in the middle of the image, regardless of its content, and drop the rest.

A baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers" (ICCV Workshops
2023, arXiv:2308.04657). Before the block, patches are ranked by their distance from the centre of the grid, in the l1, l2 or
l-infinity norm. The number of kept patches (``count``):

* ``exact``: as many as the keep rate says, int(N0 * rate^stage); of equally distant ones the first in raster order.
* ``radius``: the published rule: all within the radius whose count is nearest to that number (ties: the smaller).
* ``shrinking``: no keep rate; all within a radius that falls linearly from block to block, from the corners to
  ``smallest``, which it would reach two blocks after the last reducing block.

The published distances are used for the latter two, including float32 rounding: coordinates run from -P/2 to P/2 in P steps
(off the centre if P is odd), and rounding splits some rings of equal distance in two, which shows in the published counts.

In a clip the middle of every frame is kept, with the same distances in each.

Departure: the published code hides tokens, here they are dropped; the output is the same. Both require square grids if the
image does not have the size that the model was built for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import Schedule, of_the_initial, quarters
from laconic.core.tokens import Tokens
from laconic.methods.ops import distances, evenly, require, ring, square, topk_split, within


class HeuristicReducer(Reducer):
    """Keep the patches nearest to the centre, in their order."""

    def __init__(self, norm: str, published: bool) -> None:
        super().__init__()
        self.norm, self.published = norm, published

    def before(self, tokens: Tokens, n: int) -> Tokens:
        patches = tokens.token_of_patch.shape[1]
        *frames, rows, columns = tokens.grid or square(patches)
        if frames and self.published:
            raise ValueError(
                "heuristic: count='radius' and count='shrinking' are defined for images, and this model takes clips; use "
                "count='exact'"
            )
        far = torch.tensor(distances(rows, columns, self.norm, self.published), device=tokens.x.device)
        far = far.repeat(frames[0]) if frames else far
        return tokens.keep(topk_split(-far[tokens.origin_index], n)[0].sort(1).values)


@method(
    "heuristic",
    title="Heuristic: keep the middle of the image",
    paper="2308.04657",
    phase="before",
    score="position",
    score_detail="distance from the centre",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class Heuristic(Method):
    """Options of ``heuristic``.

    Args:
        norm: norm of the distance from the centre: ``l1`` (a diamond), ``l2`` (a disc) or ``linf`` (a square).
        count: ``exact``, ``radius`` or ``shrinking``.
        smallest: the radius that ``shrinking`` falls to; 0 means the distance of the patch in the middle.
    """

    norm: Literal["l1", "l2", "linf"] = "l2"
    count: Literal["exact", "radius", "shrinking"] = "exact"
    smallest: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("heuristic", "smallest", self.smallest, self.smallest >= 0, "must be a radius, 0 or more")

    def build(self, site: BlockContext) -> Reducer:
        return HeuristicReducer(self.norm, self.count != "exact")

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.count != "shrinking":
            return super().default_schedule(depth, keep, at)
        if keep is not None:
            raise ValueError("heuristic: with count='shrinking' the radius sets the counts: omit keep, or change count")
        first, *_, last = quarters(depth)
        return Schedule.adaptive(range(first, last + 1) if at is None else at)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        target = of_the_initial(rates, n, patches)
        return ring(patches, self.norm, target) if self.count == "radius" else target

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        if self.count != "shrinking" or schedule.unit != "adaptive":
            return super().counts(schedule, depth, patches)
        first, last = schedule.at[0], schedule.at[-1]
        side, n, out = square(patches)[0], patches, []
        table = distances(side, side, self.norm, True)
        radii = evenly(table[0], self.smallest or table[side // 2 * (side + 1)], last - first + 3)
        for block in range(depth):
            if block in schedule.at:
                n = max(1, min(n, within(patches, self.norm, radii[block - first + 1])))
            out.append(n)
        return tuple(out)
