"""AdaViT's sampled decisions in training, and its losses on the share of a model that is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

USED = "used"  # per-token column: 1 for used tokens, else 0
TOKENS, HEADS, LAYERS = "used_tokens", "used_heads", "used_layers"  # per-image values [B, M], and losses
LOGITS = {HEADS: "logits of heads", LAYERS: "logits of layers"}


class UseAll(AdaptiveReducer):
    """The reducer of a block that follows a deciding one and does not decide itself: it uses all tokens again."""

    def before(self, tokens: Tokens, n: int) -> Tokens:
        return tokens.replace(keep_mask=None)


def decided(logits: Tensor, threshold: float, tau: float | None = None) -> Tensor:
    """Return 1 where the sigmoid of the logit is above the threshold, else 0.

    With ``tau`` the decision is sampled: logistic noise (the difference of two Gumbel noises) is added to the logits, and the
    sum is divided by ``tau``. The gradients are then those of the sigmoid.
    """
    if tau is None:
        return (logits.sigmoid() > threshold).float()
    noise = torch.empty_like(logits).exponential_().log() - torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / tau).sigmoid()
    return (soft > threshold).float() + (soft - soft.detach())


def use_losses(notes: Mapping[str, Tensor], target: float, diverse: float, entropy: float) -> dict[str, Tensor]:
    """Return the losses from the recorded use in all blocks: M means over tokens, M heads, or M halves of blocks.

    ``used_tokens`` is (mean use - target)^2, ``used_heads`` and ``used_layers`` are |mean use - target|. ``diverse_heads``
    and ``diverse_layers`` are ``diverse`` times the `diverse_use`; ``entropy_heads`` and ``entropy_layers`` are below zero,
    -``entropy`` times the `mean_entropy`, which keeps decisions from becoming certain too soon.
    """
    out = dict[str, Tensor]()
    if TOKENS in notes:
        out[TOKENS] = (notes[TOKENS].mean() - target).square()
    for name, together in ((HEADS, 1), (LAYERS, 2)):  # `diverse_use` counts the two halves of a block as one layer
        if name in notes:
            out[name] = (notes[name].mean() - target).abs()
            if diverse:
                out[name.replace("used", "diverse")] = diverse * diverse_use(notes[name], target, together)
            if entropy:
                out[name.replace("used", "entropy")] = -entropy * mean_entropy(notes[LOGITS[name]])
    return out


def diverse_use(use: Float[Tensor, "B M"], target: float, together: int) -> Tensor:
    """Return the mean over the parts of a model of |mean use of the part over the images of the batch - target|.

    ``together`` neighbours are one part. It is zero if every part is used by the target share of the images.
    """
    return (use.mean(0).view(-1, together).mean(1) - target).abs().mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of decisions with these logits, in nats: -p log p - (1 - p) log(1 - p)."""
    return (F.softplus(logits) - logits * logits.sigmoid()).mean()
