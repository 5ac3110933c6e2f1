"""Training and evaluation mode, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from laconic.compression import Rows, find_compression


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
def aside(host: nn.Module, rows: Rows = "needed") -> Iterator[None]:
    """Evaluation mode for a while, for forwards that are no use of the model: the last forward stays the last one.

    They do not warn of untrained parameters; the first use still does.
    """
    compression = find_compression(host)
    if compression is None:
        with evaluating(host):
            yield
        return
    spares, remembered, fresh = compression.spares, compression.remembered(), compression.__dict__["_fresh"]
    try:
        compression.__dict__["_fresh"] = None
        compression.spares = spares and rows != "all"
        with evaluating(host):
            yield
    finally:
        compression.spares = spares
        compression.remember(remembered)
        compression.__dict__["_fresh"] = fresh
