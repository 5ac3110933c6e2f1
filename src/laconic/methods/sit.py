"""SiT: Self-slimmed Vision Transformer (Zong et al., ECCV 2022, arXiv:2111.12624): its token slimming module.

Before the block, on patch tokens only: every new token is a weighted mean of all old ones (their eqs. 2-3),

    x' = A x,    A = softmax over the tokens of (scale * Linear(GELU(Linear(LN(x)))))^T,

with C, C / 2 and n channels. As in the benchmark of Haurum et al. (ICCV Workshops 2023, arXiv:2308.04657), without the
paper's reverse slimming and feature distillation, and at three blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import Mixer, Slots


class SiTReducer(Mixer):
    """Mix tokens by weighted means, with weights from an MLP."""

    def __init__(self, site: BlockContext) -> None:
        super().__init__("sit", site)
        half = site.dim // 2
        # LayerNorm has torch's default eps of 1e-5
        self.weight = nn.Sequential(
            nn.LayerNorm(site.dim), nn.Linear(site.dim, half), nn.GELU(), nn.Linear(half, max(1, self.slots))
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        for layer in self.weight:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return (self.weight(x) * self.scale).float().softmax(1).transpose(1, 2), tokens.patches


@method(
    "sit",
    title="SiT: weighted means by a small network",
    paper="2111.12624",
    phase="before",
    score="learned",
    score_detail="learned weights",
    rest="mixed",
    rest_detail="mixed by learned weights",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class SiT(Slots):
    """``sit`` has no options."""

    def build(self, site: BlockContext) -> Reducer:
        return SiTReducer(site)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        half = site.dim // 2
        network = before * (site.dim * half + half * after)
        return {
            "matmul": network + before * after * (site.dim + 1),
            "layernorm": before * site.dim,
            "elementwise": before * after,
        }
