"""Limits on the sizes that a file may declare, so that no memory is allocated beyond what the file's bytes can justify.

A few bytes can declare any size: a image of 100,000 x 100,000 pixels, a tensor without values, a model of a million blocks.
Such sizes are compared with these limits first. The environment variable ``LACONIC_LIMITS`` is a factor on every limit.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook

VARIABLE = "LACONIC_LIMITS"
PIXELS = 2**26  # of a image, as stored and after it is resized: 8192 x 8192
PICTURE_BYTES = 2**29  # of an image file
RECORD_BYTES = 2**24  # of a JSON file that describes a model
NUMBER = 2**20  # the largest whole number in such a description: a width, a depth, a count
TIMES, ALLOWANCE = 4, 2**28  # tensors and models may take TIMES times the bytes of their file, plus ALLOWANCE bytes
TENSORS = 1000  # parameters and buffers a model may have beyond those in its file
INPUT_PIXELS = 2**24  # of the image a model is built for
ATTENTION_TIMES, ATTENTION_BYTES = 8, 2**30  # the same two limits for the attention weights of one block


class TooLarge(ValueError):
    """A file declares a size above its limit."""


def factor() -> float:
    """Return the factor on every limit, from the environment variable.

    Raises:
        ValueError: it is not a number above 0.
    """
    text = os.environ.get(VARIABLE, "") or "1"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"the environment variable {VARIABLE} must be a number above 0, a factor on all limits, not {text!r}")
    return value


def check(claim: str, found: int | float, limit: int | float, unit: str = "bytes") -> None:
    """Raise if a size is above its limit; ``claim`` begins the message: the file and the size that it declares.

    Raises:
        TooLarge: ``found`` is above ``limit`` times `factor`.
    """
    allowed = limit * factor()
    if found > allowed:
        raise TooLarge(
            f"{claim} {_amount(found, unit)}, and the limit is {_amount(allowed, unit)}; if you trust the file, set the "
            f"environment variable {VARIABLE}={math.ceil(found / limit)} or more, a factor on all limits"
        )


def _amount(number: int | float, unit: str) -> str:
    return f"{number / 2**20:,.1f} MiB" if unit == "bytes" else f"{number:,.0f} {unit}"


def memory_limit(held: int) -> int:
    """Return the bytes that tensors and models may take if their file holds ``held`` bytes."""
    return TIMES * held + ALLOWANCE


# ------------------------------------------------------------------------------------------------ files
def check_file(path: Path) -> int:
    """Return the size of a file of weights; raise if it is not a regular file, or an archive that unpacks to far more.

    Raises:
        OSError: there is no such file.
        ValueError: a device, a pipe or a directory; an archive whose list of members is damaged, or above the limit.
    """
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is not a regular file; copy its content into one")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped or zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(info.file_size for info in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            raise ValueError(
                f"{path} is damaged, cut short or not a checkpoint ({error}); compare its size with the original and download "
                "it again"
            ) from error
        check(
            f"{path} is an archive of {_amount(facts.st_size, 'bytes')} that unpacks to", unpacked, memory_limit(facts.st_size)
        )
    return facts.st_size


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that describes a model.

    Raises:
        OSError: there is no such file.
        TooLarge: the file is longer than any description of a model.
        ValueError: the file is not JSON.
    """
    check(f"{path} is a file of", check_file(path), RECORD_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def tensors_in(path: Path) -> int:
    """Return an estimate of the number of tensors in a file of weights (0 if the format is not known)."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return len(file.keys())
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return len(archive.infolist())
    return 0


def check_numbers(tree: Any, source: str, name: str = "") -> None:
    """Raise if nested JSON has a whole number too large to be a width, depth or count of any model.

    Raises:
        TooLarge: there is one above the limit.
    """
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        check_numbers(value, source, f"{name}.{key}" if name else str(key))
    if isinstance(tree, int):
        check(f"{source} sets {name} to", abs(tree), NUMBER, "")


# ------------------------------------------------------------------------------------------------ tensors
def check_tensors(weights: Mapping[str, Any], source: str, held: int | None = None) -> int:
    """Raise if tensors have no values, or declare far more bytes than are stored for them; return the stored bytes.

    Args:
        weights: tensors by name; values that are not tensors are ignored.
        source: the file, for messages.
        held: the bytes of the file; by default those of the tensors' storages.

    Raises:
        ValueError: a tensor is sparse, quantized, nested or on the meta device, or the claim is above the limit.
    """
    stored, claimed = dict[int, int](), 0
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(f"{name} in {source} is a {kind} tensor, but a dense one was expected; save it as a dense tensor")
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError) as error:  # a wrapper around other tensors
            raise ValueError(f"{name} in {source} is a {type(tensor).__name__}; save it as a plain tensor") from error
        if tensor.is_meta or storage.device.type == "meta":
            raise ValueError(
                f"{name} {list(tensor.shape)} in {source} has no values (it was saved on the meta device); save the weights "
                "after they were loaded"
            )
        stored[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.numel() * tensor.element_size()
    held = sum(stored.values()) if held is None else held
    check(f"{source} holds {_amount(held, 'bytes')}, and its tensors claim", claimed, memory_limit(held))
    return held


def check_kinds(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise if weights have a dtype of another kind than the model's, e.g. integers, which would be read as plain weights.

    Raises:
        ValueError: a tensor is of another kind (floating point, integer, or something else).
    """
    for name, tensor in expected.items():
        found = weights.get(name)
        if isinstance(found, Tensor) and _kind(found.dtype) != _kind(tensor.dtype):
            raise ValueError(
                f"{name} in {source} is of {found.dtype}, but {tensor.dtype} was expected; save the weights as tensors of "
                "that kind (after dequantizing them, if they are quantized)"
            )


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point and "float4" not in str(dtype):
        return "floating"
    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return "whole" if dtype in whole else str(dtype)


# ------------------------------------------------------------------------------------------------ models
@contextmanager
def building(source: str, held: int, tensors: int) -> Iterator[None]:
    """Stop a model that is built inside (on the meta device) as soon as its parameters and buffers are above the limits.

    Args:
        source: the file that describes the model, for messages.
        held: the bytes of the file of weights.
        tensors: the number of tensors in it.

    Raises:
        TooLarge: the model has far more bytes or tensors than the file.
    """
    thread, seen, total = threading.get_ident(), dict[int, Tensor](), 0

    def register(module: Any, name: str, tensor: Tensor | None) -> None:
        nonlocal total
        if threading.get_ident() != thread or tensor is None or id(tensor) in seen:
            return
        seen[id(tensor)] = tensor
        total += tensor.numel() * tensor.element_size()
        claim = f"{source} asks for a model that takes more than its weights"
        check(f"{claim} ({_amount(held, 'bytes')}):", total, memory_limit(held))
        check(f"{claim} ({tensors:,} tensors):", len(seen), tensors + TENSORS, "tensors")

    hooks: list[Any] = [
        register_module_parameter_registration_hook(register),
        register_module_buffer_registration_hook(register),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
