"""IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers (Pan et al., NeurIPS 2021, arXiv:2106.12620).

Before each group of blocks a multi-head interpreter scores how informative every patch token is: the mean over its heads of
sigmoid(q . k / sqrt(C / heads)), q of the class token and k of the patch token, both after a LayerNorm without parameters
(sec. 3.2). It has ``heads`` heads, six at every width.

* Inference: a token is kept if its score is above ``threshold``; dropped tokens do not come back.
* Training: the kept tokens are sampled with these probabilities. No gradient flows through sampling: interpreters learn by
  REINFORCE; the reward is higher the fewer tokens are kept, if the prediction is right (sec. 3.3). The log-probabilities of
  the samples and the shares of patches kept are recorded (`LOG_PROBABILITY`, `KEPT`: [B, groups so far]) for
  `laconic.training.policy_gradient`.

The authors released code for inference but not for training. As in that code, the projection has a third part that is not
used, so that its weights fit. ``score="mean-query"`` uses the mean patch query, for backbones without a class token.

`laconic.summary` uses the keep rate to compute cost; the interpreters ignore it, except that 1 switches a group off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveMethod, AdaptiveReducer
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import ScoreName, by_stage, renamed, require, require_class_token, start_small

LOG_PROBABILITY, KEPT = "log-probability of the draw", "share of the patches kept"


class InterpreterReducer(AdaptiveReducer):
    """Score patch tokens by one interpreter, and keep the informative ones."""

    straight_through = False

    def __init__(self, dim: int, config: IARED) -> None:
        super().__init__()
        self.config, self.qk = config, nn.Linear(dim, 3 * dim)
        start_small(self)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        there = tokens.keep_mask_or_ones.detach()
        informative = self.informative(tokens, there)
        stays = (draw(informative) if self.training else (informative > self.config.threshold).to(there.dtype)) * there
        news = {KEPT: stays.sum(1, keepdim=True) / tokens.token_of_patch.shape[1]}
        if self.training:
            p = informative.clamp(1e-6, 1 - 1e-6)
            log = torch.where(stays > 0, p.log(), (-p).log1p()) * there
            news[LOG_PROBABILITY] = log.sum(1, keepdim=True)
        return self.hide(tokens, stays).append_per_image(**news)

    def informative(self, tokens: Tokens, there: Tensor) -> Tensor:
        """Return how informative each patch token is, from 0 to 1, [B, L]."""
        x = F.layer_norm(tokens.x.to(self.qk.weight.dtype), tokens.x.shape[2:])
        (wq, wk, _), (bq, bk, _) = self.qk.weight.chunk(3), self.qk.bias.chunk(3)
        if self.config.score == "class":
            require_class_token(tokens, "so there is no class query for the interpreter; pass score='mean-query'")
            asking = F.linear(x[:, 0], wq, bq).float()
        else:
            every = F.linear(x[:, tokens.prefix :], wq, bq).float()
            asking = (every * there.unsqueeze(2)).sum(1) / there.sum(1, keepdim=True).clamp_min(1.0)
        keys = F.linear(x[:, tokens.prefix :], wk, bk).float()
        logits = (keys * asking.unsqueeze(1)).reshape(*keys.shape[:2], self.config.heads, -1).sum(3)
        return (logits * (self.config.heads / keys.shape[2]) ** 0.5).sigmoid().mean(2)


def draw(probability: Tensor) -> Tensor:
    """Return 1 with this probability, else 0."""
    return torch.bernoulli(probability.detach())


@method(
    "iared",
    title="IA-RED2: drop what an interpreter finds redundant",
    paper="2106.12620",
    phase="before",
    score="class attention",
    rest="dropped",
    trained=True,
    learns=True,
    count="variable",
)
@dataclass(frozen=True)
class IARED(AdaptiveMethod):
    """Options of ``iared``: options of the interpreters, and those of `AdaptiveMethod`."""

    heads: int = 6  # of each interpreter; they must divide the width of the model
    threshold: float = 0.5  # score above which a token is kept
    score: ScoreName = "class"  # the query of the class token, or (without a class token) the mean patch query

    def __post_init__(self) -> None:
        super().__post_init__()
        require("iared", "heads", self.heads, self.heads >= 1, "must be a number of heads, at least 1")
        require("iared", "threshold", self.threshold, 0 <= self.threshold < 1, "must be from 0 to below 1")

    def build(self, site: BlockContext) -> Reducer:
        if site.dim % self.heads:
            valid = [heads for heads in range(1, 17) if site.dim % heads == 0]
            unfit = f"{self.heads} heads do not divide the {site.dim} channels of this model"
            raise ValueError(f"iared: {unfit}; pass heads= one of {valid}")
        return InterpreterReducer(site.dim, self)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the first blocks of three groups of equal size."""
        return tuple(sorted({depth * group // 3 for group in range(3)}))

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        """Return the work as in the authors' code: it computes three projections of every token, of which two are used."""
        width = site.dim
        return {"matmul": (before + 1) * 3 * width * width + before * width, "layernorm": (before + 1) * width}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Rename the authors' weights: blocks are stored twice, and their code loads the copies inside the groups."""
        return renamed(
            by_stage(weights, at, "groups"),
            (r"(laconic\.reducers\.\d+)\.agent\.(.+)", r"\1.\2"),
            (r"laconic\.reducers\.(\d+)\.block_list\.(\d+)\.(.+)", lambda m: f"blocks.{int(m[1]) + int(m[2])}.{m[3]}"),
        )
