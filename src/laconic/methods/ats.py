"""ATS: Adaptive Token Sampling for Efficient Vision Transformers (Fayyaz et al., ECCV 2022, arXiv:2111.15667).

After the attention of a block, the class token's attention (summed over heads) times the length of a token's value scores
the token; scores are normalised to sum to one (sec. 3.1). Tokens are sampled from the scores by inverting their cumulative
sum at evenly spaced points (sec. 3.2): a token that is sampled more than once is kept once, so images with few important
tokens keep few. Keys and values are those of all tokens; the other tokens are dropped after the attention. It needs no
training.

K - 1 points lie between the smallest positive value of the cumulative sum (scores ascending, shifted to start at 0) and 1. K
is the number of input tokens, at every block, as in the published code; with a keep rate it is that share of them.

Departures: in the published code padding takes part in the cumulative sum, so that the tokens of an image depend on the other
images of the batch; here images are independent. ``values="per-head"`` is the paper's length of the value (of each head), the
default is the code's (heads concatenated). ``sampling="raster"`` is the version of Haurum et al. (ICCVW 2023): tokens in
their own order, points at the centres of K cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveMethod, AdaptiveReducer
from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import SCORES, ScoreName, best_of_rows


class ATSReducer(AdaptiveReducer):
    """Score tokens by attention and value, and sample them by the inverse of the cumulative sum."""

    def __init__(self, config: ATS) -> None:
        super().__init__()
        self.config = config

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        there = tokens.keep_mask_or_ones
        score = self.score(tokens, seen) * there
        sample = sorted_sample if self.config.sampling == "sorted" else raster_sample
        return self.hide(tokens, sample(score.detach(), there > 0, n))

    def score(self, tokens: Tokens, seen: AttentionView) -> Tensor:
        """Return the class token's attention times the length of the value, [B, L]; only ratios of scores matter."""
        if self.config.values == "per-head" and self.config.score == "class":
            return (seen.cls_heads * seen.value_lengths).sum(1)
        return SCORES[self.config.score](tokens, seen) * torch.linalg.vector_norm(seen.values, dim=-1)


def sorted_sample(score: Tensor, there: Tensor, points: int) -> Tensor:
    """Return 1 for each token hit by one of ``points`` samples of ``score`` [B, L], else 0; only tokens ``there`` take part."""
    ascending, order = score.masked_fill(~there, math.inf).sort(dim=1, stable=True)
    present = ascending.isfinite()
    total = ascending.masked_fill(~present, 0.0).cumsum(1)
    first, last = total[:, :1], total[:, -1:]
    u = ((total - first) / (last - first).clamp_min(torch.finfo(score.dtype).tiny)).masked_fill(~present, math.inf)
    start = torch.where(u > 0, u, math.inf).amin(1, keepdim=True)
    start = torch.where(start.isfinite(), start, 0.0)
    steps = torch.arange(points, device=score.device, dtype=score.dtype) / max(1, points - 1)
    hit = _hit(u, start + (1 - start) * steps)
    return torch.zeros_like(score).scatter(1, order.gather(1, hit), 1.0)


def raster_sample(score: Tensor, there: Tensor, points: int) -> Tensor:
    """Return the same as `sorted_sample`, with tokens in their own order and points at the centres of cells."""
    total = score.cumsum(1)
    u = (total / total[:, -1:].clamp_min(torch.finfo(score.dtype).tiny)).masked_fill(~there, math.inf)
    middles = (torch.arange(points, device=score.device, dtype=score.dtype) + 0.5) / (points + 1)
    return torch.zeros_like(score).scatter(1, _hit(u, middles.unsqueeze(0)), 1.0)


def _hit(u: Tensor, points: Tensor) -> Tensor:
    """Return the index of the value of ``u`` [B, L] nearest to each point [B or 1, S] (ties: the first), [B, S]."""
    return best_of_rows(points, u.shape[1], lambda part: -(u.unsqueeze(1) - part.unsqueeze(2)).abs())[1]


@method(
    "ats",
    title="ATS: sample tokens by attention and value",
    paper="2111.15667",
    phase="between",
    score="class attention",
    rest="dropped",
    trained=False,
    count="variable",
)
@dataclass(frozen=True)
class ATS(AdaptiveMethod):
    """Options of ``ats``: the length of values, the sampling, the attention score; and those of `AdaptiveMethod`."""

    values: Literal["concatenated", "per-head"] = "concatenated"
    sampling: Literal["sorted", "raster"] = "sorted"
    score: ScoreName = "class"

    def build(self, site: BlockContext) -> Reducer:
        return ATSReducer(self)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return every block from a quarter of the depth on."""
        return tuple(range(depth // 4, depth))

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Remove the authors' buffer of the value of padding (a row of zeros), which is not needed here."""
        return {name: tensor for name, tensor in weights.items() if not name.endswith(".out_zero_mask")}

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"head_mean": before, "elementwise": before}
