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
  figure of the paper comes out (its logs were tuned by hand, ``budget="log"`` follows them to 0.5 %).
* the other mergers of table 4 take the place of the clusters, no more, and make as many tokens (``merger``). Of k-means the
  sums are eq. 8's; pooling is by place and knows no weights but sizes. The two learned ones, `conv-pool` and `mlp-pool`,
  have parameters, which BAT has not: they are methods of their own, with ``pooled="inattentive"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.parts import (
    bipartite,
    by_place,
    cells,
    check_grid,
    cosine,
    density_peaks,
    greedy_pairs,
    lay,
    lloyd,
    runs,
    set_out,
    share,
    split,
)
from laconic.reducer import Method, Site, choice
from laconic.rows import iota
from laconic.tokens import Tokens

Amount = int | float | tuple[int | float, ...] | None
LOGGED = {0.7: 0, 0.6: -1, 0.5: 3, 0.4: 3, 0.3: 1, 0.2: 1}  # clusters less pairs that fit the authors' logs, by keep rate
CHOICES = {
    "steps": ("preserve", "pack", "cluster", "match", "diversity"),
    "density": ("knn", "paper"),
    "assign": ("denser", "nearest"),
    "matching": ("greedy", "bipartite"),
    "weights": ("normalised", "literal", "literal-clusters"),
    "budget": ("evit", "log"),
    "merger": ("dpc", "kmeans-1", "kmeans-3", "avg-pool", "max-pool", "spatial-pool"),
}
LLOYD = {"kmeans-1": 1, "kmeans-3": 3}  # iterations


@dataclass(frozen=True)
class Decouple(Method):
    """What ``bat`` and the methods with its merger share.

    Args:
        clusters: clusters of inattentive tokens: a count, a fraction of them, or one of these for each stage.
        pairs: fused pairs of attentive tokens: likewise, a fraction of the attentive.
        steps: the ablation of the paper's Table 3: ``preserve`` the attentive only; ``pack`` the rest into one; ``cluster``
            it; ``match`` the attentive too (all of BAT). And ``diversity``: cluster all tokens, whatever their attention.
        density, assign: of the clustering, see `laconic.parts.density_peaks`.
        matching: ``greedy`` disjoint pairs, or ``bipartite``.
        weights: ``normalised`` or ``literal`` eq. 8, or ``literal-clusters`` with normalised pairs.
        budget: default counts: as many tokens as ``evit``, or as in the authors' ``log`` (keep .7 .6 .5 .4 .3 .2 only).
        merger: what makes the clusters of inattentive tokens (table 4): density peaks (``dpc``), k-means of 1 or 3
            iterations from the most attentive of them, or pooling: the average or maximum of runs in raster order, or
            the average of cells of the image.
    """

    clusters: Amount = None
    pairs: Amount = None
    steps: Literal["preserve", "pack", "cluster", "match", "diversity"] = "match"
    density: Literal["knn", "paper"] = "knn"
    assign: Literal["denser", "nearest"] = "denser"
    matching: Literal["greedy", "bipartite"] = "greedy"
    weights: Literal["normalised", "literal", "literal-clusters"] = "normalised"
    budget: Literal["evit", "log"] = "evit"
    merger: Literal["dpc", "kmeans-1", "kmeans-3", "avg-pool", "max-pool", "spatial-pool"] = "dpc"

    def __post_init__(self) -> None:
        for option, allowed in CHOICES.items():
            choice(self.row.name, option, getattr(self, option), allowed)
        for option in ("clusters", "pairs"):
            value = getattr(self, option)
            for v in value if isinstance(value, tuple) else (value,):
                if v is not None and (v < 0 or (isinstance(v, float) and v > 1)):
                    raise ValueError(f"{self.row.name}: {option} must be a count or a fraction in [0, 1], not {v!r}")
        if self.merger != "dpc" and self.steps in ("preserve", "pack"):
            raise ValueError(f"{self.row.name}: steps={self.steps!r} makes no clusters; leave merger={self.merger!r} out")

    # ---------------------------------------------------------------------------------------------- counts
    def sets(self, attentive: int, rest: int, stage: int, keep: float | None) -> tuple[int, int]:
        """(clusters, pairs) for that many attentive and inattentive tokens."""
        if rest == 0 or self.steps == "preserve":
            return 0, 0
        if self.steps == "pack":
            return 1, 0
        net = self._net(keep)
        clusters = _amount(self.clusters, stage, rest)
        pairs = 0 if self.steps == "cluster" else _amount(self.pairs, stage, attentive)
        if clusters is None:
            tied = pairs is not None and self.steps == "match"
            clusters = pairs + net if tied and pairs is not None else max(net, min(round(0.1 * rest), attentive // 2 + net))
        clusters = min(rest, max(1, clusters))
        pairs = clusters - net if pairs is None else pairs
        return clusters, min(max(0, pairs), attentive // 2)

    def count(self, attentive: int, before: int, stage: int, keep: float | None) -> int:
        """Tokens that leave when that many of ``before`` are attentive."""
        if self.steps == "diversity":
            return min(before, attentive + self._net(keep))
        clusters, pairs = self.sets(attentive, before - attentive, stage, keep)
        return attentive - pairs + clusters

    def attentive(self, before: int, n: int, stage: int, keep: float | None) -> tuple[int, int, int]:
        """(attentive tokens, clusters, pairs) that leave n of ``before``: `count` turned round; of several the fewest.

        Raises:
            ValueError: no split leaves exactly n.
        """
        if self.steps == "diversity":
            return 0, n, 0
        tied = self.clusters is None or self.pairs is None
        for k in [n - self._net(keep)] * tied + list(range(before)):
            if 0 <= k < before and self.count(k, before, stage, keep) == n:
                return k, *self.sets(k, before - k, stage, keep)
        raise ValueError(f"{self.row.name}: no split with these clusters and pairs leaves {n} of {before} tokens")

    def _net(self, keep: float | None) -> int:
        """Clusters less pairs."""
        return 1 if self.budget == "evit" or keep is None else LOGGED[min(LOGGED, key=lambda rate: abs(rate - keep))]

    # ---------------------------------------------------------------------------------------------- merging
    def merge(self, tokens: Tokens, score: Tensor, n: int, site: Site) -> Tokens:
        """Fuse pairs of the attentive, merge clusters of the inattentive (eqs. 6-8)."""
        k, clusters, pairs = self.attentive(len(tokens), n, site.stage, site.keep)
        kept, rest = split(score, k)
        if self.merger.endswith("pool"):
            rest = by_place(tokens, rest)
        of_kept, lead = self._match(tokens, kept, pairs)
        lead, left = kept.gather(1, lead), k - pairs
        if clusters == 0:
            dst = lay(kept, rest, of_kept, torch.full_like(rest, -1))
            return tokens.merge(dst, self._weights(score, dst, n, left), lead)
        cluster, centres = self._cluster(tokens, rest, score, clusters, site)
        if self.merger == "max-pool":  # not a sum: first the pairs, then the maxima
            dst = lay(kept, rest, of_kept, iota(rest) + left)
            fused = tokens.merge(dst, self._weights(score, dst, left + rest.shape[1], left), torch.cat([lead, rest], 1))
            return fused.highest(*set_out(iota(lead), iota(rest) + left, cluster, centres))
        dst = lay(kept, rest, of_kept, cluster + left)
        weight = self._weights(score, dst, n, left)
        if self.merger.endswith("pool"):
            weight = torch.where(dst < left, weight, share(tokens.size, dst, n))
        return tokens.merge(dst, weight, torch.cat([lead, rest.gather(1, centres)], 1))

    def _cluster(self, tokens: Tokens, rest: Tensor, score: Tensor, count: int, site: Site) -> tuple[Tensor, Tensor]:
        """The cluster of each inattentive token, and the one that leads each cluster."""
        if count == 1:
            return torch.zeros_like(rest), torch.zeros_like(rest[:, :1])
        if self.merger == "dpc":
            return density_peaks(tokens.rows(rest), count, self.density, self.assign)
        if self.merger in LLOYD:
            return lloyd(tokens.rows(rest), score.gather(1, rest), iota(rest[:, :count]), LLOYD[self.merger])
        if self.merger == "spatial-pool":
            check_grid(f"{self.row.name}(merger='spatial-pool')", tokens, site.grid)
            return cells(tokens.place.gather(1, rest), site.grid, count)
        return runs(rest, count)

    def _match(self, tokens: Tokens, kept: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        """Where each attentive token goes, and which of them leads each token that comes out, all by rank."""
        rank = iota(kept)
        if pairs == 0:
            return rank, rank
        x = tokens.rows(kept)
        if self.matching == "greedy":
            first, second = greedy_pairs(x, pairs)
        else:
            odd, _, even = bipartite(cosine(x[:, 1::2], x[:, 0::2]), pairs)
            first, second = even * 2, odd * 2 + 1
        gone = torch.zeros_like(rank).scatter(1, second, 1)
        slot = rank - gone.cumsum(1)  # where a token that stays goes
        lead = gone.sort(dim=1, stable=True).indices[:, : kept.shape[1] - pairs]
        return slot.scatter(1, second, slot.gather(1, first)), lead

    def _weights(self, score: Tensor, dst: Tensor, n: int, attentive: int) -> Tensor:
        """Eq. 8: normalised, or as printed (for clusters only, or for all); a token alone in its set keeps weight one."""
        shared = share(score, dst, n)
        if self.weights == "normalised" and self.steps != "pack":
            return shared
        literal = dst >= 0 if self.weights == "literal" else dst >= attentive
        return torch.where(literal & (shared < 1), score, shared)

    def leaves(self, rates: Sequence[float], n: int, patches: int) -> int:
        return self.count(min(n, math.ceil(rates[-1] * n)), n, len(rates) - 1, rates[-1])

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        k, clusters, pairs = self.attentive(before, after, site.stage, site.keep)
        matched = (k * k if self.matching == "greedy" else (k // 2) * (k - k // 2)) * (pairs > 0)
        compared = before - k if self.merger == "dpc" else clusters * LLOYD.get(self.merger, 0)
        return {"pairwise": site.dim * ((before - k) * compared * (clusters > 1) + matched), "head_mean": before}


def _amount(value: Amount, stage: int, whole: int) -> int | None:
    """A count, a fraction of ``whole`` or one of these for each stage, as a count."""
    if isinstance(value, tuple):
        if stage >= len(value):
            raise ValueError(f"{len(value)} stages have clusters or pairs of their own, but the schedule has more")
        value = value[stage]
    return round(value * whole) if isinstance(value, float) else value
