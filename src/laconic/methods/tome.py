"""ToMe: Token Merging: Your ViT But Faster (Bolya et al., ICLR 2023, arXiv:2210.09461).

Between attention and MLP: tokens are split by the parity of their position in the sequence into A (even, like the class
token) and B; every A token is matched to the B token with the most similar key (mean over heads, cosine); the r best matches
are merged, as means weighted by size (sec. 3); the unmerged tokens of A come first in the output, in order, then all of B.
With proportional attention the log of its size is added to every logit towards a token, from the next block on (eq. 1).

Written from the paper's description alone. Prefix tokens are neither merged nor merged into, also in models with registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule, cumulative, of_the_initial
from laconic.core.shape_types import Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import Pairing, parity, require, soft_matching


class ToMeReducer(Reducer):
    """Merge tokens by bipartite soft matching on keys."""

    reads = "keys"

    def __init__(self, proportional: bool) -> None:
        super().__init__()
        self.proportional = proportional

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        dst, stay = merging(tokens, seen, n)
        tokens = tokens.merge(dst, None, stay, complete=True)
        return tokens.replace(attn_scale=tokens.size) if self.proportional else tokens


def merging(tokens: Tokens, seen: AttentionView, n: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B R"]]:
    """Return the new token that each token becomes, and the old tokens that stay, if ``n`` are to be left."""
    return soft_matching(seen.keys, *parity(tokens), len(tokens) - n)


@method(
    "tome",
    title="ToMe: merge the most similar tokens",
    paper="2210.09461",
    phase="between",
    score="similarity",
    score_detail="key similarity",
    rest="merged",
    rest_detail="merged by size",
    trained=False,
)
@dataclass(frozen=True)
class ToMe(Pairing):
    """Options of ``tome``: the number of tokens to merge in each block, and proportional attention.

    Args:
        r: tokens merged away in every block: one number, one for each block, or (r, inflection) for a linear schedule
            from r * (1 - inflection) to r * (1 + inflection). None: give a keep rate instead (at three blocks).
        proportional: add log(size) to the attention logits towards a token. Use it for models that were not trained with
            this method; turn it off for models that were trained without it.
        spread: see `Pairing`.
    """

    r: int | tuple[int | float, ...] | None = None
    proportional: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, tuple):
            counts, inflection = (self.r[:1], self.r[1]) if _inflected(self.r) else (self.r, 0.0)
            fits = all(isinstance(count, int) and count >= 0 for count in counts) and -1 <= inflection <= 1
            require("tome", "r", self.r, fits, "must be whole numbers, 0 or more, or (r, inflection) as (16, -1.0)")

    def build(self, site: BlockContext) -> Reducer:
        return ToMeReducer(self.proportional)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.r is None:
            return super().default_schedule(depth, keep, at)
        self.check_alone("r", keep)
        blocks = range(depth) if at is None else at
        return Schedule.remove_counts(dict(zip(blocks, _per_block(self.r, len(blocks)), strict=True)))

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return max(of_the_initial(rates, n, patches), n - n // 2)

    def capped(self, schedule: Schedule) -> Schedule:
        whole, rates = 1.0, list[float]()
        for number, keep in enumerate(schedule.values):  # rates refer to the initial patches: later ones compensate for a cap
            before, share = cumulative(schedule.values[:number] or (1.0,)), cumulative(schedule.values[: number + 1])
            capped = max(share, whole / 2)
            rates.append(keep if (whole, capped) == (before, share) else capped / whole)
            whole = capped
        return Schedule.rates(rates, schedule.at)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": (before // 2) * (before - before // 2) * (site.dim // site.heads)}


def _inflected(r: tuple[int | float, ...]) -> bool:
    return len(r) == 2 and (isinstance(r[1], float) or r[1] < 0)


def _per_block(r: int | tuple[int | float, ...], blocks: int) -> list[int]:
    if isinstance(r, int):
        return [r] * blocks
    if _inflected(r):
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * low) / max(1, blocks - 1)
        return [int(low + step * i) for i in range(blocks)]
    if len(r) != blocks:
        raise ValueError(f"tome: {len(r)} values of r for {blocks} blocks; give one number, or one for each block")
    return [int(value) for value in r]
