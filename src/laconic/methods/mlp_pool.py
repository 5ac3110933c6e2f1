"""MLP pooling: one of the two mergers with parameters in table 4 of BAT (Long et al., CVPR 2023, arXiv:2211.11315).

Between attention and MLP, along the sequence of tokens: x' = W x + b over the tokens, W an n x N matrix, the same for all
channels and images (no softmax: weights may be negative). Each patch is assigned to the new tokens in proportion to the
absolute values of its weights.

The paper only names it, and there is no published code. It starts as average pooling (``avg-pool``), so that a trained
backbone is not disturbed. The shape of its weights depends on the token counts: it works for one image size and one schedule,
and without keep-rate warm-in. BAT itself cannot use it as a merger (``bat`` has no parameters): pool the ``inattentive``
tokens here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.conv_pool import FIXED
from laconic.methods.resample import InSequence


class MLPPoolReducer(Reducer):
    """Apply a linear layer over the sequence; initialised to the mean of each run."""

    def __init__(self, options: MLPPool, site: BlockContext) -> None:
        super().__init__()
        _, rest, pooled = options.parts(site.before, site.after)
        self.options = options
        self.mix = nn.Linear(rest, pooled)
        with torch.no_grad():
            own = torch.arange(rest) * pooled // rest == torch.arange(pooled).unsqueeze(1)
            self.mix.weight.copy_(own / own.sum(1, keepdim=True))
            self.mix.bias.zero_()

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        kept, rest = self.options.part(tokens, seen, n, self.options.order)
        counts, built = (rest.shape[1], n - kept.shape[1]), (self.mix.in_features, self.mix.out_features)
        if counts != built:
            raise ValueError(
                f"mlp-pool was built to turn {built[0]} tokens into {built[1]} and got {counts[0]} to turn into {counts[1]}; "
                f"{FIXED}"
            )
        weight = self.mix.weight
        pooled = self.mix(tokens.rows(rest).to(weight.dtype).transpose(1, 2)).transpose(1, 2).to(tokens.x.dtype)
        # weights may be negative, so `mix` cannot compute the features: it updates all else, by absolute weights
        left = tokens.replace(x=tokens.x[..., :0]).mix(_matrix(kept, rest, weight.detach().float().abs()))
        return left.replace(x=torch.cat([tokens.x[:, : tokens.prefix], tokens.rows(kept), pooled], 1))


def _matrix(kept: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    """Return the matrix [B, n, L]: one row for each kept token alone, then ``weight`` [M, R] of the rest."""
    batch, length = kept.shape[0], kept.shape[1] + rest.shape[1]
    alone = weight.new_zeros(batch, kept.shape[1], length).scatter(2, kept.unsqueeze(2), 1.0)
    of_rest = rest.unsqueeze(1).expand(-1, len(weight), -1)
    return torch.cat([alone, weight.new_zeros(batch, len(weight), length).scatter(2, of_rest, weight.expand(batch, -1, -1))], 1)


@method(
    "mlp-pool",
    title="MLP pooling: a learned linear layer over the tokens",
    paper="2211.11315",
    phase="between",
    score="none",
    rest="mixed",
    rest_detail="mixed by learned weights",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class MLPPool(InSequence):
    """Options of ``mlp-pool``: those of `InSequence`."""

    def build(self, site: BlockContext) -> Reducer:
        return MLPPoolReducer(self, site)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        _, rest, pooled = self.parts(before, after)
        # the layer, and the update of the sizes
        return {**super().macs(before, after, site), "matmul": rest * pooled * site.dim + before * after}
