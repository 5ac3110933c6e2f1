"""BAT: Beyond Attentive Tokens (Long et al., CVPR 2023, arXiv:2211.11315): its decoupling and merger, on any score.

Between attention and MLP, class attention (eq. 5) parts the K = ceil(rate * N) attentive from the m = N - K inattentive
tokens. The inattentive are merged into c density-peak clusters (eqs. 6-7), the p most similar pairs of attentive tokens
are fused; a set C_i becomes sum of s_j z_j over C_i, s the class attention (eq. 8). K - p + c tokens leave: attentive ones
by attention (a fused pair in the place of the more attentive), then clusters by centre score.

The authors published no code; the choices here, all open to options:
* eq. 6 lacks its minus sign in print and underflows; densities are logarithms, over 5 neighbours (``density="paper"``: all).
* eq. 8 is not normalised in print, which would shrink fused attentive tokens about a hundredfold; weights sum to one in
  every set unless ``weights="literal"``, and then single tokens are left alone (``steps="pack"`` is EViT's, unnormalised).
* pairs are disjoint, taken greedily by falling cosine; ``matching="bipartite"`` matches odd to even ranks in one go.
* c = max(1, min(round(0.1 m), K // 2 + 1)) and p = c - 1, so that as many tokens leave as in EViT: with that, every
  figure of the paper comes out (its logs were tuned by hand, ``count_rule="log"`` follows them to 0.5 %).
* the other mergers of table 4 take the place of the clusters, no more, and make as many tokens (``merger``). Of k-means the
  sums are eq. 8's; pooling is by place and knows no weights but sizes. The two learned ones, `conv-pool` and `mlp-pool`,
  have parameters, which BAT has not: they are methods of their own, with ``pooled="inattentive"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Method
from laconic.core.tokens import Tokens
from laconic.methods.ops import by_place, grid_of, group_normalize, scatter_back, set_out, topk_split
from laconic.methods.ops.mergers import LLOYD, Merger, grouped, pair_up
from laconic.methods.ops.token_division import Amount, TokenDivision, check_amounts, net_of


@dataclass(frozen=True)
class Decouple(Method):
    """What ``bat`` and the methods with its merger share.

    Args:
        clusters: clusters of inattentive tokens: a count, a fraction of them, or one of these for each stage.
        pairs: fused pairs of attentive tokens: likewise, a fraction of the attentive.
        steps: the ablation of the paper's Table 3: ``preserve`` the attentive only; ``pack`` the rest into one; ``cluster``
            it; ``match`` the attentive too (all of BAT). And ``diversity``: cluster all tokens, whatever their attention.
        density, assign: of the clustering, see `laconic.methods.ops.density_peaks`.
        matching: ``greedy`` disjoint pairs, or ``bipartite``.
        weights: ``normalised`` or ``literal`` eq. 8, or ``literal-clusters`` with normalised pairs.
        count_rule: default counts: as many tokens as ``evit``, or as in the authors' ``log`` (keep .7 .6 .5 .4 .3 .2 only).
        merger: what makes the clusters of inattentive tokens (table 4): density peaks (``dpc``), k-means of 1 or 3
            iterations from the most attentive of them, or pooling: the average or maximum of runs in raster order, or
            the average of cells of the image.
    """

    old_options: ClassVar[Mapping[str, str]] = {"budget": "count_rule"}

    clusters: Amount = None
    pairs: Amount = None
    steps: Literal["preserve", "pack", "cluster", "match", "diversity"] = "match"
    density: Literal["knn", "paper"] = "knn"
    assign: Literal["denser", "nearest"] = "denser"
    matching: Literal["greedy", "bipartite"] = "greedy"
    weights: Literal["normalised", "literal", "literal-clusters"] = "normalised"
    count_rule: Literal["evit", "log"] = "evit"
    merger: Merger = "dpc"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self.info.name, clusters=self.clusters, pairs=self.pairs)
        if self.merger != "dpc" and self.steps in ("preserve", "pack"):
            raise ValueError(f"{self.info.name}: steps={self.steps!r} makes no clusters; leave merger={self.merger!r} out")

    def merge(self, tokens: Tokens, score: Tensor, n: int, site: BlockContext) -> Tokens:
        """Fuse pairs of the attentive, merge clusters of the inattentive (eqs. 6-8)."""
        k, clusters, pairs = self.attentive(len(tokens), n, site.ordinal, site.keep)
        kept, rest = topk_split(score, k)
        rest = by_place(tokens, rest) if self.merger.endswith("pool") else rest
        of_kept, lead = pair_up(tokens.rows(kept), pairs, self.matching)
        lead, left = kept.gather(1, lead), k - pairs
        by_cells = self.merger == "spatial-pool" and clusters > 1
        grid = grid_of(f"{self.info.name}(merger='spatial-pool')", tokens) if by_cells else (0, 0)
        cluster, centres = grouped(self.merger, tokens, rest, score, clusters, grid, self.density, self.assign)
        if self.merger == "max-pool":  # not a sum: first the pairs, then the maxima
            dst = scatter_back(kept, rest, of_kept, arange_like(rest) + left)
            fused = tokens.merge(dst, self._weights(score, dst, left + rest.shape[1], left), torch.cat([lead, rest], 1))
            return fused.merge_max(*set_out(arange_like(lead), arange_like(rest) + left, cluster, centres))
        dst = scatter_back(kept, rest, of_kept, cluster + left if clusters else cluster)
        weight = self._weights(score, dst, n, left, complete=clusters > 0)
        if self.merger.endswith("pool"):
            weight = torch.where(dst < left, weight, group_normalize(tokens.size, dst, n))
        return tokens.merge(dst, weight, torch.cat([lead, rest.gather(1, centres)], 1), complete=clusters > 0)

    def _weights(self, score: Tensor, dst: Tensor, n: int, attentive: int, *, complete: bool = False) -> Tensor:
        """Eq. 8: normalised, or as printed (for clusters only, or for all); a token alone in its set keeps weight one."""
        shared = group_normalize(score, dst, n, complete=complete)
        if self.weights == "normalised" and self.steps != "pack":
            return shared
        literal = dst >= 0 if self.weights == "literal" else dst >= attentive
        return torch.where(literal & (shared < 1), score, shared)

    # ---------------------------------------------------------------------------------------------- counts
    def division(self, stage: int, keep: float | None) -> TokenDivision:
        """How tokens are divided at a stage with that keep rate."""
        return TokenDivision(self.info.name, self.steps, self.clusters, self.pairs, net_of(self.count_rule, keep), stage)

    def count(self, attentive: int, before: int, stage: int, keep: float | None) -> int:
        """Tokens that leave when that many of ``before`` are attentive."""
        return self.division(stage, keep).count(attentive, before)

    def attentive(self, before: int, n: int, stage: int, keep: float | None) -> tuple[int, int, int]:
        """(attentive tokens, clusters, pairs) that leave n of ``before``."""
        return self.division(stage, keep).attentive(before, n)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return self.count(min(n, math.ceil(rates[-1] * n)), n, len(rates) - 1, rates[-1])

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        k, clusters, pairs = self.attentive(before, after, site.ordinal, site.keep)
        matched = (k * k if self.matching == "greedy" else (k // 2) * (k - k // 2)) * (pairs > 0)
        compared = before - k if self.merger == "dpc" else clusters * LLOYD.get(self.merger, 0)
        return {"pairwise": site.dim * ((before - k) * compared * (clusters > 1) + matched), "head_mean": before}
