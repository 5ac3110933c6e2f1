"""Convert values to plain Python, describe them in error messages, and limit the nesting of parsed files."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

NESTING = 100  # of tables in files; recipes and saved models need less than ten

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 16
_short.maxstring = _short.maxother = 120


def shown(value: Any) -> str:
    """Return the repr of a value for an error message: shortened, in one line."""
    try:
        return " ".join(_short.repr(value).split())
    except ValueError:  # an int with more digits than Python writes
        return f"{type(value).__name__} of thousands of digits"


def choice(owner: str, option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError if an option value is not one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{owner}: {option} must be one of {', '.join(map(repr, allowed))}, not {shown(value)}")


# ------------------------------------------------------------------------------------------------ values
def plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as a bool, int, float or str, and anything else unchanged.

    A narrow float becomes the shortest decimal that rounds to it: np.float32(0.7) becomes 0.7, not 0.699999988079071.
    A tensor that requires gradients stays a tensor, since a number would lose its gradient without notice.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor) and (value.requires_grad or value.is_meta):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "dtype") and hasattr(value, "item"):
        item = value.item()
        value = _decimal(value, item) if type(item) is float else item
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _decimal(scalar: Any, item: float) -> float:
    """Return the shortest decimal that is this number in the precision of ``scalar``."""
    if scalar.dtype.itemsize >= 8 or not math.isfinite(item):
        return item
    for digits in range(1, 10):
        short = float(f"{item:.{digits}g}")
        rounded = torch.tensor(short, dtype=scalar.dtype) if isinstance(scalar, Tensor) else scalar.dtype.type(short)
        if rounded.item() == item:
            return short
    return item


def items(value: Any) -> tuple[Any, ...] | None:
    """Return the plain values of a sequence (a list, tuple, range or array of one dimension); None if it is not one."""
    if isinstance(value, str | bytes | bytearray | Tensor):
        return None
    array = getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")
    return tuple(map(plain, value)) if array or isinstance(value, Sequence) else None


def is_whole(value: Any) -> TypeGuard[int]:
    """Return True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ files
def parsed(parse: Callable[[str], Any], text: str) -> Any:
    """Parse a text by a parser of JSON or TOML.

    Raises:
        ValueError: the parser's own error, or the text is nested too deeply.
    """
    try:
        tree = parse(text)
    except RecursionError:
        raise ValueError(f"tables and lists are nested more than {NESTING} levels deep") from None
    check_nesting(tree)
    return tree


def check_nesting(tree: Any) -> None:
    """Raise if tables and lists are nested more deeply than in any file of this library.

    Raises:
        ValueError: more than `NESTING` levels.
    """
    level = [tree]
    for _ in range(NESTING):
        inner = (part for one in level if isinstance(one, Mapping | list | tuple) for part in _parts(one))
        level = list({id(part): part for part in inner}.values())  # each object once, even if it is referenced several times
        if not level:
            return
    raise ValueError(f"tables and lists are nested more than {NESTING} levels deep")


def _parts(one: Any) -> Sequence[Any]:
    return list(one.values()) if isinstance(one, Mapping) else one
