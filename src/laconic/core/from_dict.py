"""Convert values to the types that dataclass fields declare: options of methods, and tables of TOML, JSON or command lines."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from laconic.core.suggestions import nearest_names
from laconic.core.values import is_whole, items, plain, shown

T = TypeVar("T")
MISFIT = object()
WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", dict: "a table"}
PLURALS = {float: "numbers", int: "whole numbers", str: "texts", int | float: "numbers"}


# ------------------------------------------------------------------------------------------------ tables
def build(kind: type[T], tree: Any, path: str = "") -> T:
    """Build a dataclass from nested tables; ``path`` is the position of the tree in the whole, ending with a dot.

    Raises:
        ValueError: an unknown key (the message suggests the nearest one), or a value of the wrong type.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.rstrip('.') or 'a recipe'} must be a table, not {shown(tree)}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = nearest_names(str(key), list(hints))
            raise ValueError(f"there is no key {path}{key!s}.{near} Known keys: {', '.join(hints)}")
    return kind(**{key: _fit(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _fit(hint: Any, value: Any, path: str) -> Any:
    """Return a value as its field declares it: tables become dataclasses, arrays tuples, and ints floats for a float field."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{path}.")  # type: ignore[arg-type]
    if isinstance(value, str) and value == "none" and fit(hint, None) is None:  # TOML and command lines cannot write None
        return None
    fitted = fit(hint, value)
    if fitted is MISFIT:
        raise ValueError(f"{path} must be {words(hint, 'none')}, not {shown(value)}")
    return fitted


# ------------------------------------------------------------------------------------------------ options of a method
def fit_options(config: Any, owner: str) -> dict[str, Any]:
    """Return the options of a dataclass as its annotations declare them, as plain Python values.

    Raises:
        ValueError: a value of the wrong type, an unknown word, a whole number below 0 (if the default is not), NaN.
    """
    hints, out = _hints(config.__class__), dict[str, Any]()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fitted = fit(hints.get(field.name, Any), value)
        if fitted is MISFIT:
            raise ValueError(f"{owner}: {field.name} must be {words(hints[field.name], 'None')}, not {shown(value)}")
        least = field.default if isinstance(field.default, int) and field.default < 0 else 0
        if is_whole(fitted) and fitted < least:
            raise ValueError(f"{owner}: {field.name} must be {least} or more, not {shown(value)}")
        for number in fitted if isinstance(fitted, tuple) else (fitted,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{owner}: {field.name} must be finite, not {shown(value)}")
        out[field.name] = fitted
    return out


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a class; empty if one of them uses a name that exists only for type checkers."""
    try:
        return typing.get_type_hints(kind)
    except NameError:
        return {}


# ------------------------------------------------------------------------------------------------ annotations
def fit(hint: Any, value: Any) -> Any:
    """Return a value as an annotation declares it, or `MISFIT`. Annotations that cannot be checked accept every value."""
    value, origin, arguments = plain(value), typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return next((fitted for option in arguments if (fitted := fit(option, value)) is not MISFIT), MISFIT)
    if origin is Literal:
        return next((one for one in arguments if type(one) is type(value) and one == value), MISFIT)
    if origin in (tuple, list):
        return _fit_items(origin, arguments, value)
    if origin is dict or hint is dict:
        return dict(value) if isinstance(value, Mapping) else MISFIT
    if hint is float:
        number = isinstance(value, float) or (is_whole(value) and abs(value) < sys.float_info.max)
        return float(value) if number else MISFIT
    if hint is int:
        return value if is_whole(value) else MISFIT
    kind = origin or hint
    try:
        return value if not isinstance(kind, type) or isinstance(value, kind) else MISFIT
    except TypeError:  # e.g. a protocol
        return value


def _fit_items(kind: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    parts = items(value)
    if parts is None:
        return MISFIT
    hints = arguments if kind is tuple and arguments[-1] is not Ellipsis else arguments[:1] * len(parts)
    fitted = [fit(hint, part) for hint, part in zip(hints, parts, strict=False)]
    return kind(fitted) if len(hints) == len(parts) and all(part is not MISFIT for part in fitted) else MISFIT


def words(hint: Any, none: str) -> str:
    """Describe the values that an annotation accepts, for a message; ``none`` is the word for None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        single = [option for option in arguments if not (option is int and float in arguments)]  # both are numbers
        return " or ".join(words(option, none) for option in single)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, list):
        number = "" if origin is list or arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"an array of {number}{PLURALS.get(arguments[0], 'values')}"
    return none if hint is types.NoneType else WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))
