"""Learned scores, and the keep decisions sampled from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.shape_types import Float
from laconic.methods.ops.learned import in_dtype_of


class Predictor(nn.Module):
    """DynamicViT's scorer (sec. 3.2, eqs. 1-4): maps local and global features of each token to two log-probabilities.

    Channel 0 is keep, 1 is drop. 1.625 C^2 + 4.25 C + 2 parameters.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # LayerNorm has torch's default eps of 1e-5 here, not the backbone's 1e-6
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "B L C"], alive: Float[Tensor, "B L"] | None = None) -> Float[Tensor, "B L 2"]:
        """Return the log-probabilities of keeping and dropping each token; global features average over ``alive`` tokens."""
        local, whole = self.in_conv(in_dtype_of(self, x)).chunk(2, dim=-1)
        if alive is None:
            whole = whole.mean(1, keepdim=True)
        else:
            alive = alive.unsqueeze(-1).to(whole.dtype)
            # the official code divides by zero when every token is dropped; the clamp changes no other value
            whole = (whole * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp_min(1e-6)
        return F.log_softmax(self.out_conv(torch.cat([local, whole.expand_as(local)], -1)).float(), dim=-1)


def gumbel_keep(log_probs: Float[Tensor, "B L 2"]) -> Float[Tensor, "B L"]:
    """Return a hard keep decision for each token by Gumbel softmax at temperature 1, with straight-through gradients."""
    return F.gumbel_softmax(log_probs, tau=1.0, hard=True)[..., 0]
