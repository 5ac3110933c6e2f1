"""A second classification head, used in training only."""

from __future__ import annotations

from torch import nn

from laconic.core.tokens import Tokens
from laconic.methods.ops.checks import require_class_token
from laconic.methods.ops.learned import start_small

CLASS_LOGITS = "class_logits"  # per-image value [B, classes] whose cross-entropy training adds; also the name of that loss


class ClassHead(nn.Module):
    """A norm and a linear layer on the class token; in training its logits are recorded as `CLASS_LOGITS`."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)
        start_small(self)

    def forward(self, tokens: Tokens) -> Tokens:
        """Return the tokens, in training with the recorded logits."""
        require_class_token(tokens, "which the second head reads; omit second_head")
        if not self.training:
            return tokens
        x = tokens.x[:, 0].to(self.head.weight.dtype)
        return tokens.set_per_image(**{CLASS_LOGITS: self.head(self.norm(x)).float()})
