"""DiffRate: Differentiable Compression Rate for Efficient Vision Transformers (Chen et al., ICCV 2023, arXiv:2305.17997).

Between attention and MLP the patch tokens are sorted by class attention (mean over heads), highest first. The last are pruned
until p are left; then the tail [n:] of these is merged into the head [:n], each token into the head token with the most
similar features (cosine of x after the attention residual). A merged token is the plain mean of its group. With
proportional attention, log(size) is added to the logits towards a token; here ``size`` grows by similarity times the size of
each token merged in, so that dissimilar tokens add little.

How many tokens each block prunes and merges is learned, separately for every block,
(`laconic.training.diffrate_search`) and then fixed. ``prune_kept`` and ``merge_kept`` take them as published, one number per
block with one class token counted; a count above the number of tokens has no effect. With a keep rate instead, at three
blocks by default, the share ``pruned`` of the removed tokens is pruned and the others are merged.

Departure: a size that negative similarities would reduce to zero is clamped at `MIN_ATTN_SCALE`; the published code takes its
logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laconic.core.attention import AttentionView
from laconic.core.gather import add_rows, arange_like
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, Score, ScoreName, group_normalize, nearest, topk_split

MIN_ATTN_SCALE = 1e-3


def after_pruning(before: int, after: int, prune_kept: int | None, pruned: float) -> int:
    """Return the number of ``before`` tokens left by pruning, if ``after`` are left by pruning and merging."""
    p = before - round(pruned * (before - after)) if prune_kept is None else prune_kept
    return max(after, min(p, before))


class DiffRateReducer(Reducer):
    """Sort tokens by attention, prune the last ones, merge the tail of the others into the head."""

    def __init__(self, score: Score, prune_kept: int | None, pruned: float) -> None:
        super().__init__()
        self.score, self.prune_kept, self.pruned = score, prune_kept, pruned

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        p = after_pruning(len(tokens), n, self.prune_kept, self.pruned)
        line, _ = topk_split(self.score(tokens, seen), p)
        tokens = tokens.keep(line)
        if p == n:
            return tokens
        similarity, match = nearest(tokens.patches[:, n:], tokens.patches[:, :n])
        head = arange_like(tokens.size[:, :n])
        dst = torch.cat([head, match], 1)
        gate = tokens.attn_scale_or_ones
        grown = gate * torch.cat([torch.ones_like(gate[:, :n]), similarity], 1)
        tokens = tokens.merge(dst, group_normalize(torch.ones_like(tokens.size), dst, n, complete=True), head, complete=True)
        return tokens.replace(attn_scale=add_rows(grown, dst, n, head).clamp_min(MIN_ATTN_SCALE))


@method(
    "diffrate",
    title="DiffRate: prune, then merge, with learned counts",
    paper="2305.17997",
    phase="between",
    score="class attention",
    rest="dropped and merged",
    rest_detail="dropped or merged",
    trained=False,
)
@dataclass(frozen=True)
class DiffRate(Method):
    """Options of ``diffrate``: the learned counts, or the share of removed tokens that is pruned.

    Args:
        prune_kept: tokens kept by pruning, for every block of the model, one class token counted, as published.
        merge_kept: tokens kept after merging, that is by the whole block; counted in the same way. None: give a keep rate
            for each reducing block instead.
        pruned: without ``prune_kept``, the share of the removed tokens that is pruned and not merged.
        score: ``class`` attention, or (without a class token) that of the ``mean-query``.
    """

    prune_kept: tuple[int, ...] | None = None
    merge_kept: tuple[int, ...] | None = None
    pruned: float = 0.5
    score: ScoreName = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pruned <= 1:
            raise ValueError(f"diffrate: pruned must be a share of the removed tokens, from 0 to 1, not {self.pruned!r}")
        for name, counts in (("prune_kept", self.prune_kept), ("merge_kept", self.merge_kept)):
            if any(count < 2 for count in counts or ()):
                raise ValueError(f"diffrate: {name} must count the class token and at least one more token; got {counts}")

    def build(self, site: BlockContext) -> Reducer:
        return DiffRateReducer(SCORES[self.score], self._prune_kept(site), self.pruned)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.merge_kept is None:
            return super().default_schedule(depth, keep, at)
        if keep is not None or at is not None:
            raise ValueError("diffrate: merge_kept sets how many tokens every block keeps; do not give keep or at with it")
        prune_kept = self.prune_kept or self.merge_kept
        if not len(self.merge_kept) == len(prune_kept) == depth:
            raise ValueError(
                f"diffrate: {len(prune_kept)} counts in prune_kept and {len(self.merge_kept)} in merge_kept for {depth} "
                "blocks; give one count for each block"
            )
        least = map(min, self.merge_kept, prune_kept)
        return Schedule.keep_counts({block: count - 1 for block, count in enumerate(least)})

    def may_rise(self) -> bool:
        return self.merge_kept is not None

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        merged = after_pruning(before, after, self._prune_kept(site), self.pruned) - after
        return {"head_mean": before, "matmul": merged * after * site.dim}

    def _prune_kept(self, site: BlockContext) -> int | None:
        if self.prune_kept is None:
            return None
        if site.block >= len(self.prune_kept):
            raise ValueError(f"diffrate: prune_kept has {len(self.prune_kept)} counts, none for block {site.block}")
        return self.prune_kept[site.block] - 1
