"""AdaViT's decisions in training, and its losses on how much of a model is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

USED = "used"  # the column that says which tokens are
TOKENS, HEADS, LAYERS = "used_tokens", "used_heads", "used_layers"  # notes [B, M] of an image, and losses
LOGITS = {HEADS: "logits of heads", LAYERS: "logits of layers"}


class Everything(AdaptiveReducer):
    """Behind a block that decides comes one that does not: it uses all tokens again."""

    def before(self, tokens: Tokens, n: int) -> Tokens:
        return tokens.replace(keep_mask=None)


def decided(logits: Tensor, threshold: float, tau: float | None = None) -> Tensor:
    """1 where the sigmoid is above the threshold, else 0.

    With ``tau`` by chance: logistic noise (the difference of two Gumbel noises) is added to the logits, and the sum divided
    by ``tau``. Gradients are then those of the sigmoid.
    """
    if tau is None:
        return (logits.sigmoid() > threshold).float()
    noise = torch.empty_like(logits).exponential_().log() - torch.empty_like(logits).exponential_().log()
    soft = ((logits + noise) / tau).sigmoid()
    return (soft > threshold).float() + (soft - soft.detach())


def use_losses(notes: Mapping[str, Tensor], target: float, diverse: float, entropy: float) -> dict[str, Tensor]:
    """Losses from what is noted of the use in all blocks: M tokens' means, M heads or M halves of blocks.

    ``used_tokens`` is (mean use - target)^2, ``used_heads`` and ``used_layers`` are |mean use - target|. ``diverse_heads``
    and ``diverse_layers`` are ``diverse`` times the `diverse_use`; ``entropy_heads`` and ``entropy_layers`` are below zero,
    -``entropy`` times the `mean_entropy`, so that decisions are kept from being certain too soon.
    """
    out = dict[str, Tensor]()
    if TOKENS in notes:
        out[TOKENS] = (notes[TOKENS].mean() - target).square()
    for name, together in ((HEADS, 1), (LAYERS, 2)):  # the two halves of a block are one layer to `diverse_use`
        if name in notes:
            out[name] = (notes[name].mean() - target).abs()
            if diverse:
                out[name.replace("used", "diverse")] = diverse * diverse_use(notes[name], target, together)
            if entropy:
                out[name.replace("used", "entropy")] = -entropy * mean_entropy(notes[LOGITS[name]])
    return out


def diverse_use(use: Float[Tensor, "B M"], target: float, together: int) -> Tensor:
    """Mean distance from the target, over the parts of a model, of each one's mean use by the images of the batch.

    ``together`` neighbours are one part. Zero where every part is used by the wished share of images: by some, not by all.
    """
    return (use.mean(0).view(-1, together).mean(1) - target).abs().mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of decisions with these logits, in nats: -p log p - (1 - p) log(1 - p)."""
    return (F.softplus(logits) - logits * logits.sigmoid()).mean()
