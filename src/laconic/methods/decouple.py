"""BAT: Beyond Attentive Tokens (Long et al., CVPR 2023, arXiv:2211.11315): its decoupling and merger, for any score.

Between attention and MLP, class attention (eq. 5) separates the K = ceil(rate * N) attentive from the m = N - K inattentive
tokens. The inattentive tokens are merged into c density-peak clusters (eqs. 6-7), and the p most similar pairs of attentive
tokens are fused; a set C_i becomes the sum of s_j z_j over C_i, s the class attention (eq. 8). K - p + c tokens remain: the
attentive ones by attention (a fused pair takes the position of its more attentive token), then the clusters by centre score.

The authors published no code. The choices made here, all of which have options:
* eq. 6 lacks its minus sign in print and underflows; densities are logarithms, over 5 neighbours (``density="paper"``: all).
* eq. 8 is not normalised in print, which would shrink fused attentive tokens about a hundredfold; weights sum to one in
  every set unless ``weights="literal"``, which still does not scale single tokens (``steps="pack"`` is EViT's, unnormalised).
* pairs are disjoint, chosen greedily by falling cosine; ``matching="bipartite"`` matches odd to even ranks in one pass.
* c = max(1, min(round(0.1 m), K // 2 + 1)) and p = c - 1, so that as many tokens remain as in EViT: with this, every
  cost figure of the paper is reproduced (its logs were tuned by hand, ``count_rule="log"`` follows them to 0.5 %).
* the other mergers of table 4 replace only the clusters, and make as many tokens (``merger``). k-means uses the sums of
  eq. 8; pooling is by position and is weighted by size only. The two learned ones, `conv-pool` and `mlp-pool`, have
  parameters, which BAT does not: they are separate methods, with ``pooled="inattentive"``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
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
    """Shared options and operations of ``bat`` and the methods that use its merger.

    Args:
        clusters: clusters of inattentive tokens: a count, a fraction of them, or one of these for each reducing block.
        pairs: fused pairs of attentive tokens: a count, a fraction of them, or one of these for each reducing block.
        steps: the ablation of the paper's Table 3: ``preserve`` only the attentive tokens; ``pack`` the others into one;
            ``cluster`` the others; also ``match`` the attentive ones (all of BAT). And ``diversity``: cluster all tokens,
            regardless of their attention.
        density, assign: options of the clustering, see `laconic.methods.ops.density_peaks`.
        matching: ``greedy`` disjoint pairs, or ``bipartite``.
        weights: ``normalised`` or ``literal`` eq. 8, or ``literal-clusters`` with normalised pairs.
        count_rule: default counts: as many tokens as ``evit``, or as the authors' ``log`` (keep .7 .6 .5 .4 .3 .2 only).
        merger: the clustering of inattentive tokens (table 4): density peaks (``dpc``); k-means of 1 or 3 iterations,
            starting from the most attentive of them; or pooling: the average or maximum of runs in raster order, or the
            average of cells of the image.
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
    budget: InitVar[str | None] = field(default=None, kw_only=True)  # count_rule, under its name of version 0.1

    def __post_init__(self, budget: str | None = None) -> None:  # noqa: RUF033 (subclasses call it without)
        if budget is not None:
            warnings.warn("bat: option budget is now count_rule", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "count_rule", budget)
        super().__post_init__()
        check_amounts(self.info.name, clusters=self.clusters, pairs=self.pairs)
        if self.merger != "dpc" and self.steps in ("preserve", "pack"):
            raise ValueError(f"{self.info.name}: steps={self.steps!r} makes no clusters; omit merger={self.merger!r}")

    def merge(self, tokens: Tokens, score: Tensor, n: int, site: BlockContext) -> Tokens:
        """Fuse pairs of attentive tokens and merge clusters of inattentive tokens (eqs. 6-8)."""
        k, clusters, pairs = self.attentive(len(tokens), n, site.ordinal, site.keep)
        kept, rest = topk_split(score, k)
        rest = by_place(tokens, rest) if self.merger.endswith("pool") else rest
        of_kept, lead = pair_up(tokens.rows(kept), pairs, self.matching)
        lead, left = kept.gather(1, lead), k - pairs
        by_cells = self.merger == "spatial-pool" and clusters > 1
        grid = grid_of(f"{self.info.name}(merger='spatial-pool')", tokens) if by_cells else (0, 0)
        cluster, centres = grouped(self.merger, tokens, rest, score, clusters, grid, self.density, self.assign)
        if self.merger == "max-pool":  # a maximum is not a weighted sum: fuse the pairs first, then take the maxima
            dst = scatter_back(kept, rest, of_kept, arange_like(rest) + left)
            fused = tokens.merge(dst, self._weights(score, dst, left + rest.shape[1], left), torch.cat([lead, rest], 1))
            return fused.merge_max(*set_out(arange_like(lead), arange_like(rest) + left, cluster, centres))
        dst = scatter_back(kept, rest, of_kept, cluster + left if clusters else cluster)
        weight = self._weights(score, dst, n, left, complete=clusters > 0)
        if self.merger.endswith("pool"):
            weight = torch.where(dst < left, weight, group_normalize(tokens.size, dst, n))
        return tokens.merge(dst, weight, torch.cat([lead, rest.gather(1, centres)], 1), complete=clusters > 0)

    def _weights(self, score: Tensor, dst: Tensor, n: int, attentive: int, *, complete: bool = False) -> Tensor:
        """Return the weights of eq. 8: normalised, or as printed (for clusters or all); a single token has weight one."""
        shared = group_normalize(score, dst, n, complete=complete)
        if self.weights == "normalised" and self.steps != "pack":
            return shared
        literal = dst >= 0 if self.weights == "literal" else dst >= attentive
        return torch.where(literal & (shared < 1), score, shared)

    # ---------------------------------------------------------------------------------------------- counts
    def division(self, stage: int, keep: float | None) -> TokenDivision:
        """Return the division of tokens at the reducing block number ``stage``, with keep rate ``keep``."""
        return TokenDivision(self.info.name, self.steps, self.clusters, self.pairs, net_of(self.count_rule, keep), stage)

    def count(self, attentive: int, before: int, stage: int, keep: float | None) -> int:
        """Return the number of tokens that remain if ``attentive`` of ``before`` tokens are attentive."""
        return self.division(stage, keep).count(attentive, before)

    def attentive(self, before: int, n: int, stage: int, keep: float | None) -> tuple[int, int, int]:
        """Return the (attentive tokens, clusters, pairs) with which n of ``before`` tokens remain."""
        return self.division(stage, keep).attentive(before, n)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return self.count(min(n, math.ceil(rates[-1] * n)), n, len(rates) - 1, rates[-1])

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        k, clusters, pairs = self.attentive(before, after, site.ordinal, site.keep)
        matched = (k * k if self.matching == "greedy" else (k // 2) * (k - k // 2)) * (pairs > 0)
        compared = before - k if self.merger == "dpc" else clusters * LLOYD.get(self.merger, 0)
        return {"pairwise": site.dim * ((before - k) * compared * (clusters > 1) + matched), "head_mean": before}
