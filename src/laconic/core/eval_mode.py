"""Training and evaluation mode, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from laconic.core.token_reduction import Compute, find_reduction


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode is put back. What is no module is passed over."""
    asked = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for model in asked for module in model.modules()]
    for model in asked:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def aside(host: nn.Module, compute: Compute = "needed") -> Iterator[None]:
    """Evaluation mode for a while, for forwards that are no use of the model: the last forward stays the last one.

    They do not warn of untrained parameters; the first use still does.
    """
    reduction = find_reduction(host)
    if reduction is None:
        with evaluating(host):
            yield
        return
    spares, remembered, fresh = reduction.spares, reduction.remembered(), reduction.__dict__["_fresh"]
    try:
        reduction.__dict__["_fresh"] = None
        reduction.spares = spares and compute != "all"
        with evaluating(host):
            yield
    finally:
        reduction.spares = spares
        reduction.remember(remembered)
        reduction.__dict__["_fresh"] = fresh
