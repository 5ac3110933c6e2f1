"""Nested tables (of TOML, JSON or a command line) as dataclasses: unknown keys and values of the wrong type are refused."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from laconic.reducer import nearest_names

T = TypeVar("T")
MISFIT = object()
WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false", dict: "a table"}
PLURALS = {float: "numbers", int: "whole numbers", str: "texts"}


def build(kind: type[T], tree: Any, path: str = "") -> T:
    """A dataclass from nested tables; ``path`` is where the tree stands in the whole, with a dot at its end.

    Raises:
        ValueError: an unknown key (and the nearest one), or a value of the wrong type.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path.rstrip('.') or 'a recipe'} must be a table, not {tree!r}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = nearest_names(str(key), list(hints))
            raise ValueError(f"there is no key {path}{key!s}.{near} There are: {', '.join(hints)}")
    return kind(**{key: _fit(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _fit(hint: Any, value: Any, path: str) -> Any:
    """A value as a field declares it: tables become dataclasses, arrays tuples, whole numbers floats where floats stand."""
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{path}.")  # type: ignore[arg-type]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value == "none" and types.NoneType in options:  # TOML and command lines have no word for it
        return None
    for option in options:
        fitted = _try(option, value)
        if fitted is not MISFIT:
            return fitted
    raise ValueError(f"{path} must be {' or '.join(_words(option) for option in options)}, not {value!r}")


def _try(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in arguments else MISFIT
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return MISFIT
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        parts = [_try(h, v) for h, v in zip(hints, value, strict=False)]
        return tuple(parts) if len(hints) == len(value) and MISFIT not in parts else MISFIT
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else MISFIT
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else MISFIT


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"an array of {count}{PLURALS.get(arguments[0], 'values')}"
    return "none" if hint is types.NoneType else WORDS.get(origin or hint, str(hint))
