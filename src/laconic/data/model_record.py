"""The record of a trained model: its class names, its preprocessing and a fingerprint of its training images, as plain JSON.

It is an attribute of the model, so that it stays with copies of the model, and `laconic.save` writes it to the directory.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from laconic.core.backbone import unwrapped
from laconic.core.values import parsed, shown

RECORD = "laconic_data"  # name of the attribute
CARRIED = "laconic"  # entry of the metadata of weights: laconic.json, which has the record under ``data``
NUMBERS = {"mean": 3, "std": 3}  # entries of the preprocessing that are lists of numbers


def one_form(name: str) -> str:
    """Return the composed Unicode form of a name (NFC): file systems differ in it, and the names look the same."""
    return unicodedata.normalize("NFC", name)


def record_of(model: nn.Module) -> dict[str, Any]:
    """Return the record of a model; empty if it has none."""
    record: dict[str, Any] = vars(unwrapped(model)).get(RECORD, {})
    return record


def set_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Keep a record with a model, in the place of an earlier one."""
    setattr(unwrapped(model), RECORD, dict(record))


def record_in(path: Path) -> dict[str, Any]:
    """Return the record in the metadata of a safetensors file; empty if there is none, and for other files.

    Raises:
        ValueError: the record does not have the form of one.
    """
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # who reads the weights says so
    if CARRIED in metadata:
        whole = parsed(json.loads, metadata[CARRIED])
        return check_record(whole.get("data", {}) if isinstance(whole, dict) else whole)
    return check_record(parsed(json.loads, metadata[RECORD])) if RECORD in metadata else {}  # an earlier form


def check_record(record: Any) -> dict[str, Any]:
    """Return a record that was read from a file.

    Raises:
        ValueError: it does not have the form of a record.
    """
    if not isinstance(record, dict):
        raise ValueError(f"data must be a table with classes and preprocessing, not {shown(record)}")
    classes, how = record.get("classes", []), record.get("preprocessing", {})
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"data.classes must be a list of names, not {shown(classes)}")
    if len(set(classes)) < len(classes):
        raise ValueError("data.classes has a name twice, and every class must have a name of its own")
    if not isinstance(how, dict):
        raise ValueError(f"data.preprocessing must be a table, not {shown(how)}")
    for name, count in NUMBERS.items():
        value = how.get(name, [0.0] * count)
        if not (isinstance(value, list) and all(isinstance(number, int | float) for number in value)):
            raise ValueError(f"data.preprocessing.{name} must be a list of numbers, not {shown(value)}")
    return record
