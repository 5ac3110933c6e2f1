"""PatchMerger: Learning to Merge Tokens in Vision Transformers (Renggli et al., 2022, arXiv:2202.12015).

Before the block, on patch tokens only: n learned queries W attend to the layer-normalised tokens (their eq. 1),

    Y = softmax(W LN(X)^T) LN(X).

As in the benchmark of Haurum et al. (ICCV Workshops 2023, arXiv:2308.04657) the logits are not scaled, the class token
bypasses the merger, and there is one merger at each reducing block (the paper has one, in mid-depth).

Departure: queries start with a standard deviation of 1 / sqrt(C), so that logits start with one of about 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import Mixer, Slots


class PatchMergerReducer(Mixer):
    """Mix tokens by the attention of learned queries."""

    def __init__(self, site: BlockContext) -> None:
        super().__init__("patchmerger", site)
        self.norm = nn.LayerNorm(site.dim)  # torch's default eps of 1e-5
        self.queries = nn.Parameter(torch.randn(self.slots, site.dim) * site.dim**-0.5)

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return (self.queries @ x.transpose(1, 2)).float().softmax(2), x


@method(
    "patchmerger",
    title="PatchMerger: learned queries attend to the tokens",
    paper="2202.12015",
    phase="before",
    score="learned",
    score_detail="learned queries",
    rest="mixed",
    rest_detail="mixed by attention of the queries",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class PatchMerger(Slots):
    """``patchmerger`` has no options."""

    def build(self, site: BlockContext) -> Reducer:
        return PatchMergerReducer(site)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": before * after * (2 * site.dim + 1), "layernorm": before * site.dim}
