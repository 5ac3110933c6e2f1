"""TPS: Joint Token Pruning and Squeezing (Wei et al., CVPR 2023, arXiv:2304.10716), as eTPS and dTPS.

Score and split the tokens into reserved and pruned; match every pruned token to its most similar reserved token, its host
(eqs. 4-5, cosine c_ij); fuse each host j with the pruned tokens i that chose it (eq. 6):

    x'_j = (e x_j + sum_i exp(c_ij) x_i) / (e + sum_i exp(c_ij)),    e = exp(1), the weight of a match with itself.

No token is added, and a host that nobody chose is unchanged. eTPS scores with class attention between attention and MLP
and keeps ceil(rate * N); dTPS scores with DynamicViT's predictor before the block and keeps int(N0 * rate^stage).

Training: eTPS is the same operation. dTPS keeps its shape: decisions are Gumbel-sampled, hosts are fused softly with
straight-through gradients, pruned tokens are masked afterwards.

Departures: in an exact tie the published code credits every tied host in full, here the first takes it. There is no
published code of eTPS; it is the composition that the authors describe, and its cost agrees with theirs to the digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.attention import Seen
from laconic.methods.dynamicvit import LearnedPrune, predictor_macs
from laconic.parts import SCORES, ScoreName, arbitrary, cosine, lay, one_to_one, split
from laconic.reducer import Method, Reducer, Site, choice, method
from laconic.schedule import of_the_initial
from laconic.tokens import Tokens, iota, take

CHOICES = {
    "similarity": ("cosine", "previous-attention"),
    "features": ("full", "content", "position"),
    "matching": ("many-to-one", "one-to-one"),
    "fusing": ("weighted", "average"),
    "policy": ("original", "random"),
}


@dataclass(frozen=True)
class Squeeze(Method):
    """The ablations of the TPS paper, shared by ``etps`` and ``dtps``.

    Args:
        similarity: ``cosine`` of the features, or the attention from pruned to reserved token (mean over heads): of this
            block for eTPS, of the block before for dTPS. The latter needs rows of the attention matrix.
        features: what the cosine compares: the ``full`` features, the absolute ``position`` embedding of the tokens'
            places, or the ``content`` (features less position embedding).
        matching: ``many-to-one``, or ``one-to-one``: of the pruned tokens that chose one host only the most similar is fused.
        fusing: ``weighted`` as above, or the plain ``average`` of a host and its pruned tokens.
        policy: keep by the ``original`` score, or at ``random`` (drawn by ``seed``).
        temperature: divides the similarity.
    """

    similarity: Literal["cosine", "previous-attention"] = "cosine"
    features: Literal["full", "content", "position"] = "full"
    matching: Literal["many-to-one", "one-to-one"] = "many-to-one"
    fusing: Literal["weighted", "average"] = "weighted"
    policy: Literal["original", "random"] = "original"
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, allowed in CHOICES.items():
            choice(self.row.name, option, getattr(self, option), allowed)
        if not self.temperature > 0:
            raise ValueError(f"{self.row.name}: temperature must be positive, not {self.temperature!r}")

    def view(self, tokens: Tokens) -> Tensor:
        """What the cosine compares, [B, L, C]."""
        if self.features == "full":
            return tokens.patches
        if tokens.positions is None:
            raise LookupError(
                f"{self.row.name}: features={self.features!r} needs an absolute position embedding for every patch, which "
                "this model does not have; use features='full'"
            )
        position = tokens.positions[tokens.place]
        return position if self.features == "position" else tokens.patches - position

    def similarities(self, tokens: Tokens, seen: Seen | None, kept: Tensor, rest: Tensor) -> Tensor:
        """c_ij of every pruned token (rows) to every reserved one, [B, R, K]."""
        if self.similarity == "cosine":
            x = self.view(tokens)
            return cosine(take(x, rest), take(x, kept)) / self.temperature
        if seen is None and NOTED not in tokens.columns:
            raise LookupError(f"{self.row.name}: similarity='previous-attention' needs a block before the one it reduces at")
        rows = seen.rows(rest) if seen is not None else take(tokens.columns[NOTED], rest)
        return rows.gather(2, kept.unsqueeze(1).expand(-1, rest.shape[1], -1)) / self.temperature

    def squeeze(self, tokens: Tokens, seen: Seen | None, score: Tensor, n: int) -> Tokens:
        """Match and fuse (eqs. 4-6): n tokens, by falling score."""
        kept, rest = split(score, n)
        c, host = self.similarities(tokens, seen, kept, rest).max(2)
        if self.matching == "one-to-one":
            host = one_to_one(c, host, n)
        own = math.e if self.fusing == "weighted" else 1.0
        pull = c.exp() if self.fusing == "weighted" else torch.ones_like(c)
        total = own + torch.zeros_like(kept, dtype=c.dtype).scatter_add(1, host.clamp_min(0), pull.masked_fill(host < 0, 0.0))
        weight = lay(kept, rest, own / total, pull / total.gather(1, host.clamp_min(0)))
        return tokens.merge(lay(kept, rest, iota(kept), host), weight, kept)

    def soft_squeeze(self, tokens: Tokens, keep: Tensor, gone: Tensor) -> Tokens:
        """The same with all tokens in place: hosts (``keep``) are fused with the tokens that leave now (``gone``)."""
        everyone = iota(keep)
        c = self.similarities(tokens, None, everyone, everyone)
        eye = torch.eye(len(tokens), dtype=torch.bool, device=c.device)
        c = c.masked_fill(eye | (keep == 0).unsqueeze(1), -100.0)
        best, host = c.max(2)
        dst = torch.where(keep > 0, everyone, torch.where((gone > 0) & (keep > 0).any(1, keepdim=True), host, -1))
        if self.matching == "one-to-one":
            dst = torch.where(gone > 0, one_to_one(best.masked_fill(gone == 0, -200.0), host, len(tokens)), dst)
        chosen = F.one_hot(dst.clamp_min(0), len(tokens)).to(c.dtype) * (gone * (dst >= 0)).unsqueeze(2)  # [B, i, j]
        own = math.e if self.fusing == "weighted" else 1.0
        pull = (chosen * best.unsqueeze(2)).exp() * chosen if self.fusing == "weighted" else chosen
        total = own + pull.sum(1)
        patches = (own / total).unsqueeze(2) * tokens.patches + (pull / total.unsqueeze(1)).transpose(1, 2) @ tokens.patches.to(
            c.dtype
        )
        x = torch.cat([tokens.x[:, : tokens.prefix], patches.to(tokens.x.dtype)], 1)
        return tokens.replace(x=x).fade(keep, dst)

    def squeeze_macs(self, before: int, after: int, dim: int) -> int:
        """Multiply-adds as the authors count them: similarity and fusing are one product each."""
        return dim * after * (before - after) * (2 if self.similarity == "cosine" else 1)


NOTED = "attention before"  # column [B, L, L]: head-mean attention of the block before, patch tokens only


class ETPSReducer(Reducer):
    """Class attention, then squeeze."""

    def __init__(self, config: ETPS, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def between(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        random = self.config.policy == "random"
        score = arbitrary(tokens, self.seed) if random else SCORES[self.config.score](tokens, seen)
        return self.config.squeeze(tokens, seen, score, n)


@method(
    "etps",
    title="eTPS: prune by class attention, squeeze the rest into their hosts",
    paper="2304.10716",
    moment="between",
    score="class attention",
    rest="squeezed into the most similar kept token",
    trained=False,
)
@dataclass(frozen=True)
class ETPS(Squeeze):
    """Options of ``etps``: those of `Squeeze`, and what scores a token."""

    score: ScoreName = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("etps", "score", self.score, list(SCORES))

    def build(self, site: Site) -> Reducer:
        return ETPSReducer(self, self.seed * 1009 + site.stage)

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        return {"matmul": self.squeeze_macs(before, after, site.dim), "head_mean": before}


class WatchfulPrune(LearnedPrune):
    """`LearnedPrune` that notes the attention of the block before."""

    def watch(self, tokens: Tokens, seen: Seen) -> Tokens:
        return tokens.replace(columns={**tokens.columns, NOTED: seen.rows(iota(tokens.size))})


@method(
    "dtps",
    title="dTPS: prune by a learned score, squeeze the rest into their hosts",
    paper="2304.10716",
    moment="before",
    score="learned predictor",
    rest="squeezed into the most similar kept token",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class DTPS(Squeeze):
    """Options of ``dtps``: those of `Squeeze` (the random policy counts at inference only)."""

    def build(self, site: Site) -> Reducer:
        seed = self.seed * 1009 + site.stage
        kind = LearnedPrune if self.similarity == "cosine" else WatchfulPrune
        return kind(site.dim, partial(self._hard, seed), self._soft)

    def _hard(self, seed: int, tokens: Tokens, score: Tensor, n: int) -> Tokens:
        score = arbitrary(tokens, seed) if self.policy == "random" else score
        return _forget(self.squeeze(tokens, None, score, n))

    def _soft(self, tokens: Tokens, keep: Tensor, gone: Tensor) -> Tokens:
        return _forget(self.soft_squeeze(tokens, keep, gone))

    def leaves(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        predictor = predictor_macs(before, site.dim)
        return {**predictor, "matmul": predictor["matmul"] + self.squeeze_macs(before, after, site.dim)}


def _forget(tokens: Tokens) -> Tokens:
    return tokens.replace(columns={name: c for name, c in tokens.columns.items() if name != NOTED})
