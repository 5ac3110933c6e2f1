"""Entries of a file's metadata on the use of its model: preprocessing, names of the classes, source of the weights, cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from laconic.data.classes import names_of
from laconic.data.preprocessing import config_at

RANDOM = "RANDOM"  # the word in ``weights`` of a model that was not trained


def describe_use(
    model: nn.Module, shape: Sequence[int], classes: Sequence[str] | None = None, weights: str | None = None
) -> dict[str, str]:
    """Return the entries ``preprocessing``, ``classes``, ``weights``, ``parameters`` and ``macs``, each only where it is known.

    Args:
        model: the model to export.
        shape: channels, height and width of its images.
        classes: names of its first outputs, in order; None: those that the model was trained with, if it tells.
        weights: where its weights come from.

    Raises:
        TypeError, ValueError: ``classes`` are not texts, two are equal, or the model has fewer outputs.
    """
    found = dict[str, str]()
    prepared = preprocessing_of(model, shape)
    if prepared is not None:
        found["preprocessing"] = json.dumps(prepared)
    classes = classes if classes is not None else names_of(model) or None
    if classes is not None:
        found["classes"] = json.dumps(_checked(classes, getattr(model, "num_classes", None)), ensure_ascii=False)
    if weights is not None:
        found["weights"] = weights
    return {**found, **_cost(model)}


def preprocessing_of(model: nn.Module, shape: Sequence[int]) -> dict[str, Any] | None:
    """Return timm's data config of a model (input_size, interpolation, mean, std, crop_pct, crop_mode) for this image size.

    None for a model without a ``pretrained_cfg`` of timm, and without timm: its preprocessing is not known.
    """
    if not getattr(model, "pretrained_cfg", None):
        return None
    try:
        config = config_at(model, tuple(shape))
    except ImportError:
        return None
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def _checked(classes: Sequence[str], outputs: Any) -> list[str]:
    names = list(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"classes must be a sequence of names, not {classes!r}")
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"classes has a name more than once: {', '.join(twice[:5])}; give every output its own name")
    if isinstance(outputs, int) and 0 < outputs < len(names):
        raise ValueError(f"classes has {len(names)} names, but the model has {outputs} outputs; give the names of its outputs")
    return names


def _cost(model: nn.Module) -> dict[str, str]:
    """Return the multiply-adds and the parameters of a supported model; empty for others."""
    from laconic.analysis.macs import summary

    try:
        cost = summary(model)
    except (TypeError, ValueError, LookupError):  # no model that `reduce_` supports: exported with ``example``
        return {}
    return {"macs": str(cost.macs), "parameters": str(cost.parameters)}
