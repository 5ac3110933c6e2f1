"""Context managers that run a model in evaluation mode and restore its state afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from laconic.core.token_reduction import Compute, find_reduction


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Set models to evaluation mode, and restore each module's mode afterwards. Objects that are not modules are ignored."""
    found = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for model in found for module in model.modules()]
    for model in found:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_recording(host: nn.Module, compute: Compute = "needed") -> Iterator[None]:
    """Set evaluation mode for measuring forwards: they do not replace the last forward that ``provenance(model)`` reports.

    They do not warn about untrained parameters; the first real forward still does.
    """
    reduction = find_reduction(host)
    if reduction is None:
        with evaluating(host):
            yield
        return
    skip_unused, remembered, fresh = reduction.skip_unused, reduction.remembered(), reduction.__dict__["_fresh"]
    try:
        reduction.__dict__["_fresh"] = None
        reduction.skip_unused = skip_unused and compute != "all"
        with evaluating(host):
            yield
    finally:
        reduction.skip_unused = skip_unused
        reduction.remember(remembered)
        reduction.__dict__["_fresh"] = fresh
