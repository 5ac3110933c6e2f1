"""A learned score that is computed for every head."""

from __future__ import annotations

from torch import Tensor, nn

from laconic.core.shape_types import Float
from laconic.methods.ops.learned import in_dtype_of
from laconic.methods.ops.predictor import Predictor


class Selector(nn.Module):
    """SPViT's scorer (sec. 3.2): the score of every token in every head, and the weight of each head.

    One `Predictor` is shared by the heads; channel 0 is keep, 1 is drop.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        narrow = max(1, heads // 2)
        self.heads, self.predictor = heads, Predictor(dim // heads)
        self.senet = nn.Sequential(nn.Linear(heads, narrow), nn.GELU(), nn.Linear(narrow, heads))

    def forward(
        self, x: Float[Tensor, "B L C"], alive: Float[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L 2"], Float[Tensor, "B L 2"]]:
        """Return log-probabilities and probabilities of keeping (0) and dropping (1), [B, L, 2] each, as means over heads."""
        parts = in_dtype_of(self, x).reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, D]
        weight = self.senet(parts.mean(3)).float().sigmoid().unsqueeze(3)
        weight = weight / weight.sum(2, keepdim=True)
        log = self.predictor(parts.transpose(1, 2).flatten(0, 1), alive.repeat_interleave(self.heads, 0))
        log = log.view(x.shape[0], self.heads, *log.shape[1:]).transpose(1, 2)
        return (weight * log).sum(2), (weight * log.exp()).sum(2)
