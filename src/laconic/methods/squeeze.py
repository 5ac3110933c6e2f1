"""TPS: Joint Token Pruning and Squeezing (Wei et al., CVPR 2023, arXiv:2304.10716): shared operations of eTPS and dTPS.

Score and split the tokens into reserved and pruned; match every pruned token to its most similar reserved token, its host
(eqs. 4-5, cosine c_ij); fuse each host j with the pruned tokens i matched to it (eq. 6):

    x'_j = (e x_j + sum_i exp(c_ij) x_i) / (e + sum_i exp(c_ij)),    e = exp(1), the weight of a match with itself.

No token is added, and a host without matches is unchanged. eTPS scores with class attention between attention and MLP
and keeps ceil(rate * N); dTPS scores with DynamicViT's predictor before the block and keeps int(N0 * rate^stage).

Training: eTPS runs the same operation. dTPS keeps the number of tokens: decisions are Gumbel-sampled, hosts are fused softly
with straight-through gradients, pruned tokens are masked afterwards.

Departures: in an exact tie the published code matches the pruned token to every tied host in full, here only to the first.
There is no published code of eTPS; this is the composition that the authors describe, and its cost matches theirs in every
digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import add_rows, arange_like, gather_rows
from laconic.core.method import Method
from laconic.core.tokens import Tokens
from laconic.methods.ops import best_of_rows, nearest, one_to_one, require, scatter_back, topk_split

NOTED = "attention before"  # per-token column [B, L, L]: head-mean attention of the block before, patch tokens only


@dataclass(frozen=True)
class Squeeze(Method):
    """The ablations of the TPS paper, shared by ``etps`` and ``dtps``.

    Args:
        similarity: ``cosine`` of the features, or the attention from pruned to reserved token (mean over heads): of this
            block for eTPS, of the block before for dTPS. Attention needs rows of the attention matrix.
        features: the features that the cosine compares: the ``full`` features, the absolute ``position`` embedding of the
            tokens' positions, or the ``content`` (features minus position embedding).
        matching: ``many-to-one``, or ``one-to-one``: of the pruned tokens matched to one host only the most similar is fused.
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
        super().__post_init__()
        least = "must be positive, and at least 0.02: fusing computes exp(similarity / temperature)"
        require(self.info.name, "temperature", self.temperature, self.temperature >= 0.02, least)

    @property
    def reads_positions(self) -> bool:
        """True if position embeddings are compared."""
        return self.features != "full"

    def view(self, tokens: Tokens, index: Tensor) -> Tensor:
        """Return the features of the tokens ``index`` that the cosine compares, [B, K, C]."""
        if self.features == "full":
            return tokens.rows(index)
        if tokens.positions is None:
            raise LookupError(
                f"{self.info.name}: features={self.features!r} needs an absolute position embedding for every patch, which "
                "this model does not have; use features='full'"
            )
        position = tokens.positions[tokens.origin_index.gather(1, index)]
        return position if self.features == "position" else tokens.rows(index) - position

    def hosts(
        self, tokens: Tokens, seen: AttentionView | None, kept: Tensor, rest: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each pruned token's highest c_ij to a reserved token that is not hidden, and that token's rank, [B, R]."""
        if self.similarity == "cosine":
            both = self.view(tokens, torch.cat([kept, rest], 1))  # one gather for both
            best, host = nearest(both[:, kept.shape[1] :], both[:, : kept.shape[1]], hidden)
            return best if self.temperature == 1 else best / self.temperature, host
        if seen is None and NOTED not in tokens.per_token:
            raise LookupError(
                f"{self.info.name}: similarity='previous-attention' needs the attention of the block before the reducing "
                "block; reduce at a later block (at=...)"
            )

        def attention(part: Tensor) -> Tensor:
            rows = seen.rows(part) if seen is not None else gather_rows(tokens.per_token[NOTED], part)
            towards = gather_rows(rows.transpose(1, 2), kept).transpose(1, 2)
            return towards if hidden is None else towards.masked_fill(hidden.unsqueeze(1), -1.0)

        best, host = best_of_rows(rest, len(tokens) * (1 if seen is None else seen.q.shape[1]), attention)
        return best / self.temperature, host

    def squeeze(self, tokens: Tokens, seen: AttentionView | None, score: Tensor, n: int) -> Tokens:
        """Match and fuse (eqs. 4-6); n tokens remain, by falling score."""
        kept, rest = topk_split(score, n)
        c, host = self.hosts(tokens, seen, kept, rest)
        own = math.e if self.fusing == "weighted" else 1.0
        pull, into = c.exp() if self.fusing == "weighted" else torch.ones_like(c), host
        if self.matching == "one-to-one":
            host = one_to_one(c, host, n)
            pull, into = pull.masked_fill(host < 0, 0.0), host.clamp_min(0)
        total = own + add_rows(pull, into, n)
        weight = scatter_back(kept, rest, own / total, pull / total.gather(1, into))
        dst = scatter_back(kept, rest, arange_like(kept), host)
        return tokens.merge(dst, weight, kept, complete=self.matching == "many-to-one")

    def soft_squeeze(self, tokens: Tokens, keep: Tensor, gone: Tensor) -> Tokens:
        """Fuse hosts (``keep``) with the tokens pruned now (``gone``) as in `squeeze`, but remove no token."""
        index = arange_like(keep)
        best, host = self.hosts(tokens, None, index, index, keep == 0)
        dst = torch.where(keep > 0, index, torch.where((gone > 0) & (keep > 0).any(1, keepdim=True), host, -1))
        if self.matching == "one-to-one":
            dst = torch.where(gone > 0, one_to_one(best.masked_fill(gone == 0, -200.0), host, len(tokens)), dst)
        chosen, into = (gone * (dst >= 0)).to(best.dtype), dst.clamp_min(0)
        own = math.e if self.fusing == "weighted" else 1.0
        pull = (chosen * best).exp() * chosen if self.fusing == "weighted" else chosen
        total = own + add_rows(pull, into, len(tokens))
        weight = (pull / total.gather(1, into)).unsqueeze(2)
        fused = add_rows(weight * tokens.patches.to(best.dtype), into, len(tokens))
        patches = (own / total).unsqueeze(2) * tokens.patches + fused
        x = torch.cat([tokens.x[:, : tokens.prefix], patches.to(tokens.x.dtype)], 1)
        return tokens.replace(x=x).soft_drop(keep, dst)

    def squeeze_macs(self, before: int, after: int, dim: int) -> dict[str, int]:
        """Return the work as in the authors' code: one product each for similarity and fusing; weights and hosts are scaled."""
        pairs = after * (before - after)
        return {"matmul": dim * pairs * (2 if self.similarity == "cosine" else 1), "elementwise": 2 * pairs + dim * after}
