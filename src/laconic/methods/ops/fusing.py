"""Matching in both directions and merging of attention weights, for MCTF (arXiv:2403.10030)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, gather_rows
from laconic.core.shape_types import Float, Int
from laconic.methods.ops.matching import bipartite, scatter_back, topk_split


def both_ways(
    score: Float[Tensor, "B M K"], a: Int[Tensor, "B M"], b: Int[Tensor, "B K"], forward: int, back: int
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B Q"]]:
    """Return the new token of each token, and the kept tokens: of ``a`` in their order, then of ``b`` by falling score.

    The ``forward`` best matched tokens of ``a`` merge into their matches; then the ``back`` best matched of all ``b``,
    including what was merged into them, merge into a remaining token of ``a``. If ``back`` is 0, ``b`` keeps its order.
    """
    gone_a, stay_a, match = bipartite(*score.detach().max(2), forward)
    gone_b, stay_b, host = b[:, :0], arange_like(b), b
    if back:
        best, host = gather_rows(score, stay_a).max(1)
        gone_b, stay_b = topk_split(best, back)
    of_b = scatter_back(stay_b, gone_b, arange_like(stay_b) + stay_a.shape[1], host.gather(1, gone_b))
    of_a = scatter_back(stay_a, gone_a, arange_like(stay_a), of_b.gather(1, match))
    return scatter_back(a, b, of_a, of_b), torch.cat([a.gather(1, stay_a), b.gather(1, stay_b)], 1)


def fuse(
    attention: Float[Tensor, "B H N N"], dst: Int[Tensor, "B L"], weight: Float[Tensor, "B L"], lead: Int[Tensor, "B Q"]
) -> Float[Tensor, "B H M M"]:
    """Return the attention among merged tokens: rows averaged by ``weight``, columns summed; prefix tokens are unchanged.

    ``dst`` and ``lead`` are those of `Tokens.merge`, complete.
    """
    batch, heads, before, _ = attention.shape
    prefix = before - dst.shape[1]
    own, total = torch.arange(prefix, device=dst.device).expand(batch, -1), prefix + lead.shape[1]
    every, first = torch.cat([own, dst + prefix], 1), torch.cat([own, lead + prefix], 1)
    rows = attention * F.pad(weight, (prefix, 0), value=1.0).unsqueeze(1).unsqueeze(3)
    rows = add_rows(rows.transpose(1, 2).flatten(2), every, total, first).view(batch, total, heads, before)
    columns = add_rows(rows.permute(0, 3, 2, 1).flatten(2), every, total, first)
    return columns.view(batch, total, heads, total).permute(0, 2, 3, 1)


def soften(criterion: Tensor, tau: float) -> Tensor:
    """Return criterion^(1 / tau), or ones if tau is 0 (criterion off)."""
    return criterion.pow(1 / tau) if tau else torch.ones_like(criterion)
