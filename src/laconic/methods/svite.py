"""SViTE+: Chasing Sparsity in Vision Transformers: An End-to-End Exploration (Chen et al., NeurIPS 2021, arXiv:2106.04533).

This is the token selection only; sparse weights (SViTE, S2ViTE) are in `laconic.training.sparsity`, independent of tokens.
Before the first block, after adding the position embedding, a linear layer gives every token one score.

* Training: log-softmax over all tokens, including the class token, plus Gumbel noise, over tau; the k largest are kept
  with straight-through gradients: x is multiplied by a mask that is 0 or 1 and has the gradient of the softmax.
* Inference: the k highest scores are kept. The published code draws noise here too.

The other tokens (``rest``):

* ``drop``: they are dropped, in training too. The mask passes gradients at the kept tokens (and by the softmax to all scores).
* ``zero``, as published: they are set to zero and still take part in attention. Zero tokens are all equal and stay equal, so
  here they are a single token whose attention scale is their number: the same function and the same gradients, without
  their cost (with rotary position embeddings it is an approximation). Of n tokens n - 1 are then chosen by score.

Departure: the published top k may or may not count the class token, which is always kept; here n patch tokens are kept.
tau is fixed by an option; the paper anneals it linearly from 10 to 0.1: call `set_temperature` before each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import require, topk_split


class TokenSelection(Reducer):
    """Score tokens by a linear layer before the block, and keep the k highest."""

    def __init__(self, dim: int, rest: str, tau: float) -> None:
        super().__init__()
        self.scorer = nn.Linear(dim, 1)
        self.rest, self.tau = rest, tau

    def before(self, tokens: Tokens, n: int) -> Tokens:
        count = n if self.rest == "drop" else n - 1
        if not self.training:
            kept, rest = topk_split(self._score(tokens.patches), count)
            mask = chosen(kept, tokens)
        else:
            log_p = self._score(tokens.x).log_softmax(-1)
            noisy = log_p - torch.empty_like(log_p).exponential_().log()
            kept, rest = topk_split(noisy[:, tokens.prefix :], count)
            soft = (noisy / self.tau).softmax(-1)[:, tokens.prefix :]
            mask = chosen(kept, tokens) + (soft - soft.detach())
        if self.rest == "zero":
            return zero(tokens, kept, rest, mask)
        weight = F.pad(mask, (tokens.prefix, 0), value=1.0).unsqueeze(-1)
        return tokens.replace(x=tokens.x * weight.to(tokens.x.dtype)).keep(kept)

    def _score(self, x: Tensor) -> Tensor:
        return self.scorer(x.to(self.scorer.weight.dtype)).squeeze(-1).float()


def chosen(kept: Int[Tensor, "B K"], tokens: Tokens) -> Float[Tensor, "B L"]:
    """Return 1 for the kept tokens, 0 for the others."""
    return torch.zeros_like(tokens.size).scatter(1, kept, 1.0)


def zero(tokens: Tokens, kept: Int[Tensor, "B K"], rest: Int[Tensor, "B R"], mask: Float[Tensor, "B L"]) -> Tokens:
    """Multiply by the mask, and replace all tokens that become zero by one whose attention scale is their number."""
    gate = tokens.attn_scale_or_ones
    many = gate.gather(1, rest).sum(1, keepdim=True)
    dst = torch.full_like(tokens.origin_index, kept.shape[1]).scatter(1, kept, arange_like(kept))
    share = (gate / many).scatter(1, kept, 1.0)  # the zero tokens have equal shares in the features of the single token
    out = tokens.merge(dst, mask * share, torch.cat([kept, rest[:, :1]], 1), complete=True)
    return out.replace(attn_scale=torch.cat([gate.gather(1, kept), many], 1))


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the training temperature ``tau`` of every token selection in ``model``."""
    require("svite", "tau", tau, tau > 0, "must be above 0")
    for module in model.modules():
        if isinstance(module, TokenSelection):
            module.tau = tau


@method(
    "svite",
    title="SViTE+: a learned choice of tokens before the first block",
    paper="2106.04533",
    phase="before",
    score="learned",
    score_detail="learned linear",
    rest="dropped",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class SViTE(Method):
    """Options of ``svite``: ``drop`` or ``zero`` the ``rest``, and the temperature ``tau`` of training."""

    rest: Literal["drop", "zero"] = "drop"
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("svite", "tau", self.tau, self.tau > 0, "must be above 0")

    def build(self, site: BlockContext) -> Reducer:
        return TokenSelection(site.dim, self.rest, self.tau)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        return super().default_schedule(depth, keep, (0,) if at is None else at)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": before * site.dim}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        ours = f"laconic.reducers.{at[0]}.scorer."
        return {ours + n.removeprefix("gumbel.") if n.startswith("gumbel.") else n: w for n, w in weights.items()}
