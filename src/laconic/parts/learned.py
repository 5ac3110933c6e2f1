"""How layers start that a method adds to a model."""

from __future__ import annotations

from torch import nn


def start_small(module: nn.Module) -> None:
    """Linear layers as those of vision transformers start: small weights (a cut normal of 0.02), biases of zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
