"""Fixed patterns: keep the patches in the middle of the image, whatever is in it, and drop the rest.

A baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers" (ICCV Workshops
2023, arXiv:2308.04657). Before the block a patch is judged by its distance from the centre of the grid, in the l1, l2 or
l-infinity norm. How many stay (``count``):

* ``exact``: as many as the keep rate says, int(N0 * rate^stage); of equally near ones those that come first.
* ``radius``: the published rule: all within the radius whose number is nearest to that (of two as near, the smaller).
* ``shrinking``: no keep rate; all within a radius that falls linearly from block to block, from the corners to
  ``smallest``, where it would be two blocks after the last one that reduces.

The published distances are kept for the latter two, float32 and all: coordinates run from -P/2 to P/2 in P steps (off the
centre where P is odd), and rounding parts some rings of equal distance in two, which shows in the published counts.

Departure: the published code hides tokens, here they leave; the answer is the same. Both take square grids where the image
is not of the size that the model was built for.
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
    """Keep the patches nearest to the centre, in the order they come."""

    def __init__(self, norm: str, published: bool) -> None:
        super().__init__()
        self.norm, self.published = norm, published

    def before(self, tokens: Tokens, n: int) -> Tokens:
        patches = tokens.token_of_patch.shape[1]
        rows, columns = tokens.grid or square(patches)
        far = torch.tensor(distances(rows, columns, self.norm, self.published), device=tokens.x.device)
        return tokens.keep(topk_split(-far[tokens.origin_index], n)[0].sort(1).values)


@method(
    "heuristic",
    title="Heuristic: keep the middle of the image",
    paper="2308.04657",
    phase="before",
    score="distance from the centre",
    rest="dropped",
    trained=False,
)
@dataclass(frozen=True)
class Heuristic(Method):
    """Options of ``heuristic``.

    Args:
        norm: of the distance from the centre: ``l1`` (a diamond), ``l2`` (a disc) or ``linf`` (a square).
        count: ``exact``, ``radius`` or ``shrinking``.
        smallest: the radius that ``shrinking`` falls to; 0 is that of the patch in the middle.
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
            raise ValueError("heuristic: with count='shrinking' the radius says how many stay: leave keep out, or change count")
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
