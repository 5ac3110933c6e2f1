"""The two files of a saved model, ``model.safetensors`` and ``laconic.json``, and the change of both at once.

The metadata of the weights has a copy of ``laconic.json``, so that the file of the weights alone is a whole model: moving it to
its place is the one step that changes a directory from the old model to the new one. If a process is killed before it has
moved ``laconic.json`` too, `read_record` finds another ``id`` there than in the weights, and takes the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from laconic.core import limits
from laconic.core.arguments import check_compute, fill
from laconic.core.files import follow_umask, unfinished, writing
from laconic.core.values import check_nesting, is_whole, shown
from laconic.data.model_record import CARRIED, check_record

WEIGHTS, RECORD, FORMAT = "model.safetensors", "laconic.json", 1


def write_model(directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write both files: in full to a temporary directory, then moved, so that a failed write changes nothing.

    Equal models give equal files.

    Args:
        directory: created if it does not exist.
        weights: tensors by name; they are copied to the CPU.
        record: the content of ``laconic.json``.

    Raises:
        ValueError: the record cannot be written as JSON.
        Unwritable: the directory cannot be written, or there is no room (the message has the sizes).
    """
    try:
        name = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:16]
    except TypeError as error:
        raise ValueError(f"nothing was saved to {directory}: an option of the method is not plain JSON ({error})") from error
    text = json.dumps({**record, "id": name}, indent=2) + "\n"
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in weights.items()}
    size = sum(tensor.nbytes for tensor in copies.values()) + 2 * len(text)
    with unfinished(directory / WEIGHTS, size) as place, writing(directory / WEIGHTS, size):
        # one entry alone: safetensors writes several in any order
        save_file(copies, place / WEIGHTS, metadata={CARRIED: text})
        (place / RECORD).write_text(text, encoding="utf-8")
        for file in (WEIGHTS, RECORD):  # in this order
            follow_umask(place / file)
            os.replace(place / file, directory / file)


def digest(model: nn.Module) -> str:
    """Return a hash of the weights of a model."""
    out = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        out.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ reading
def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: the file is missing. ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it there, or save the model again")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or download it again") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``laconic.json``; its method and schedule are None for a model that is not reduced.

    Raises:
        FileNotFoundError: it is missing. ValueError: it is damaged, of a newer format, or asks for too much memory.
    """
    if not path.is_file():
        advice = ""
        if (path.parent / WEIGHTS).is_file():
            advice = (
                f"; if {WEIGHTS} in it are the weights of a timm model, give that model's name, and the file with --weights"
            )
        raise FileNotFoundError(
            f"{path} is missing, so {path.parent} is not a directory that laconic.save has finished{advice}"
        )
    record = _checked(path, _parsed(path))
    carried = _carried(path.with_name(WEIGHTS))
    if carried is not None and carried.get("id") != record.get("id"):  # of an earlier save
        record = _checked(path.with_name(WEIGHTS), carried)
    try:
        fill(record.get("restore"))
        record.setdefault("compute", record.pop("rows", None))  # its name in version 0.1
        check_compute(record["compute"])
        check_record(record.get("data", {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    options = (record["method"] or {}).get("options", {})
    sizes = {name: value for name, value in options.items() if name != "seed"} if isinstance(options, dict) else {}
    limits.check_numbers({"model": record["model"], "options": sizes, "schedule": record["schedule"]}, str(path))
    return record


def _parsed(path: Path) -> Any:
    try:
        record = limits.read_json(path)
        check_nesting(record)
    except limits.TooLarge:
        raise
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is damaged ({error}); copy or download it again, or save the model again") from error
    return record


def _carried(path: Path) -> dict[str, Any] | None:
    """Return the record in the metadata of a file of weights; None if there is none, or the file cannot be read."""
    try:
        limits.check_file(path)
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CARRIED)
    except (SafetensorError, OSError, ValueError):
        return None  # who reads the weights says so
    if text is None:
        return None
    limits.check(f"the metadata of {path} are", len(text), limits.RECORD_BYTES)
    try:
        record = json.loads(text)
        check_nesting(record)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _checked(path: Path, record: Any) -> dict[str, Any]:
    """Return a record that has the parts of one, in a format that this version reads."""
    found = record.get("format") if isinstance(record, dict) else None
    if is_whole(found) and found > FORMAT:
        raise ValueError(
            f"{path} has format {found}, written by laconic {record.get('laconic')}; this version reads up to {FORMAT}: "
            "pip install --upgrade laconic"
        )
    parts = ("model",) if _has_no_method(record) else ("model", "method", "schedule")
    if found is None or not all(isinstance(record.get(part), dict) for part in parts):
        raise ValueError(f"{path} is not a record of laconic.save: it must hold format, model, method and schedule")
    if not is_whole(found) or found < 1:
        raise ValueError(f"{path}: format must be a whole number from 1 to {FORMAT}, not {shown(found)}")
    whole: dict[str, Any] = record
    return whole


def _has_no_method(record: Any) -> bool:
    """Return True for the record of a model that is not reduced."""
    absent = object()
    return isinstance(record, dict) and all(record.get(part, absent) is None for part in ("method", "schedule"))
