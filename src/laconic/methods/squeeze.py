"""TPS: Joint Token Pruning and Squeezing (Wei et al., CVPR 2023, arXiv:2304.10716): what eTPS and dTPS share.

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
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.attention import Seen
from laconic.parts import check_choices, cosine, demand, lay, one_to_one, split
from laconic.reducer import Method
from laconic.rows import iota, take
from laconic.tokens import Tokens

NOTED = "attention before"  # column [B, L, L]: head-mean attention of the block before, patch tokens only


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
        check_choices(self)
        demand(self.row.name, "temperature", self.temperature, self.temperature > 0, "must be positive")

    def view(self, tokens: Tokens, index: Tensor) -> Tensor:
        """What the cosine compares of the tokens ``index``, [B, K, C]."""
        if self.features == "full":
            return tokens.rows(index)
        if tokens.positions is None:
            raise LookupError(
                f"{self.row.name}: features={self.features!r} needs an absolute position embedding for every patch, which "
                "this model does not have; use features='full'"
            )
        position = tokens.positions[tokens.place.gather(1, index)]
        return position if self.features == "position" else tokens.rows(index) - position

    def similarities(self, tokens: Tokens, seen: Seen | None, kept: Tensor, rest: Tensor) -> Tensor:
        """c_ij of every pruned token (rows) to every reserved one, [B, R, K]."""
        if self.similarity == "cosine":
            return cosine(self.view(tokens, rest), self.view(tokens, kept)) / self.temperature
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
        guests = (pull / total.unsqueeze(1)).transpose(1, 2) @ tokens.patches.to(c.dtype)
        patches = (own / total).unsqueeze(2) * tokens.patches + guests
        x = torch.cat([tokens.x[:, : tokens.prefix], patches.to(tokens.x.dtype)], 1)
        return tokens.replace(x=x).fade(keep, dst)

    def squeeze_macs(self, before: int, after: int, dim: int) -> dict[str, int]:
        """Work as the authors' code does it: similarity and fusing are one product each; weights and hosts are scaled."""
        pairs = after * (before - after)
        return {"matmul": dim * pairs * (2 if self.similarity == "cosine" else 1), "elementwise": 2 * pairs + dim * after}
