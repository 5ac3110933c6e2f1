"""Initialisation and dtype of the layers that a method adds to a model."""

from __future__ import annotations

from torch import Tensor, nn


def start_small(module: nn.Module) -> None:
    """Initialise linear layers as in vision transformers: weights from a truncated normal (std 0.02), biases of zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def in_dtype_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of a module's parameters; a DataParallel replica has none: ``x`` is unchanged then."""
    parameter = next(module.parameters(), None)
    return x if parameter is None else x.to(parameter.dtype)
