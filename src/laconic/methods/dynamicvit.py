"""DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (Rao et al., NeurIPS 2021, arXiv:2106.02034).

Before a block, a small predictor gives every token the log-probabilities of being kept and dropped (eqs. 1-4).

* Inference: keep the int(N0 * rate^stage) tokens most likely to be kept, by falling probability (eq. 6).
* Training: a hard Gumbel-softmax decision per token, times the previous decision (eqs. 7-8); no token is removed, but
  attention is masked so that only a dropped token itself attends to it (eqs. 10-11), and the predictor's global features
  average over the kept tokens. Loss "ratio": the mean over images of (share kept - rate^stage)^2 (eq. 16).

Departures: the published softmax adds eps/N (eps = 1e-6) to every attention weight; here it does not, so that fused
attention kernels can be used. Denominators are clamped; the published code divides by zero when all tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.ops import Predictor, by_stage, gumbel_keep, shuffled
from laconic.methods.topk import drop

Rest = Callable[[Tokens, Tensor, int], Tokens]  # (tokens, score, n): reduce, at inference
SoftRest = Callable[[Tokens, Tensor, Tensor], Tokens]  # (tokens, keep, gone): the same with soft decisions, in training


class LearnedPrune(Reducer):
    """Score tokens by a predictor before the block and reduce them: with ``rest`` at inference, ``soft_rest`` in training."""

    def __init__(self, dim: int, rest: Rest, soft_rest: SoftRest) -> None:
        super().__init__()
        self.predictor = Predictor(dim)
        self.rest, self.soft_rest = rest, soft_rest

    def before(self, tokens: Tokens, n: int) -> Tokens:
        log_probs = self.predictor(tokens.patches, tokens.keep_mask)
        if not self.training:
            return self.rest(tokens, log_probs[..., 0], n)
        alive = tokens.keep_mask_or_ones
        keep = gumbel_keep(log_probs) * alive
        return self.soft_rest(tokens, keep, (1 - keep) * alive)

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        return {} if tokens.keep_mask is None else {"ratio": (tokens.keep_mask.mean(1) - rate).square().mean()}


def soft_drop(tokens: Tokens, keep: Tensor, gone: Tensor) -> Tokens:
    """Hide the dropped tokens from attention, without removing them."""
    return tokens.soft_drop(keep, torch.where(keep > 0, arange_like(keep), -1))


def _drop_at_random(seed: int, tokens: Tokens, score: Tensor, n: int) -> Tokens:
    return drop(tokens, shuffled(score, tokens, seed), n)


def predictor_macs(before: int, dim: int) -> dict[str, int]:
    """Return the work of one predictor on ``before`` tokens: its layers, its LayerNorm, and masking its global features."""
    linear = dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2
    return {"matmul": before * linear, "layernorm": before * dim, "elementwise": before * (dim // 2)}


@method(
    "dynamicvit",
    title="DynamicViT: prune by a learned score",
    paper="2106.02034",
    phase="before",
    score="learned",
    score_detail="learned predictor",
    rest="dropped",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class DynamicViT(Method):
    """Options of ``dynamicvit``: ``policy="random"`` permutes the scores among the tokens at random, by ``seed``.

    This is an ablation of the TPS paper, and has an effect at inference only.
    """

    policy: Literal["original", "random"] = "original"
    seed: int = 0

    def build(self, site: BlockContext) -> Reducer:
        if self.policy == "original":
            return LearnedPrune(site.dim, drop, soft_drop)
        return LearnedPrune(site.dim, partial(_drop_at_random, self.seed * 1009 + site.ordinal), soft_drop)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return predictor_macs(before, site.dim)

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        return by_stage(weights, at, "score_predictor", "predictor.")
