"""Sinkhorn tokenizer: tokens are transported to learned centres (Haurum et al., Automation in Construction 144, 2022).

As in the benchmark of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers" (ICCV
Workshops 2023, arXiv:2308.04657). Before the block, on patch tokens only: tokens x and the n centres v are scaled to
length one; exp(v x^T / eps) is scaled by rows and columns in turn, ``iterations`` times and in the log domain, so that
every centre and every token has the same mass; the plan T, times n + L, mixes the tokens: x' = T x. The lengths of the
features are lost, so this needs training.

Departure: the published code overwrites its centres by the scaled ones in every forward; here the parameters are unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import Mixer, Slots, transport


class SinkhornReducer(Mixer):
    """Mix tokens by optimal transport to learned centres."""

    def __init__(self, site: BlockContext, eps: float, iterations: int) -> None:
        super().__init__("sinkhorn", site)
        self.eps, self.iterations = eps, iterations
        self.v = nn.Parameter(F.normalize(torch.randn(self.slots, site.dim), dim=-1))

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x = F.normalize(x.float(), dim=-1)
        return transport(F.normalize(self.v.float(), dim=-1) @ x.transpose(1, 2), self.eps, self.iterations), x


@method(
    "sinkhorn",
    title="Sinkhorn: transport tokens to learned centres",
    paper="2308.04657",
    phase="before",
    score="learned",
    score_detail="learned centres",
    rest="mixed",
    rest_detail="mixed by optimal transport",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class Sinkhorn(Slots):
    """Options of ``sinkhorn``: ``eps``, the temperature of the transport, and ``iterations``, its number of scalings."""

    eps: float = 1.0
    iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"sinkhorn: eps must be positive, not {self.eps!r}")
        if self.iterations < 1:
            raise ValueError(f"sinkhorn: iterations must be at least 1, not {self.iterations!r}")

    def build(self, site: BlockContext) -> Reducer:
        return SinkhornReducer(site, self.eps, self.iterations)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": before * after * (2 * site.dim + 1), "elementwise": before * site.dim}
