"""The rows of a comparison: the unreduced model, methods on it, and always the alternatives that need no method at all.

Random pruning and average pooling show what a method's idea is worth; a lower input resolution and the next smaller model
are the other two ways to spend fewer multiply-adds.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from laconic.analysis.diagnose import shared_copy
from laconic.analysis.input_size import whole_batch
from laconic.analysis.macs import counted, summary
from laconic.analysis.per_image_cost import observe
from laconic.analysis.summary import Observed
from laconic.api import reduce_
from laconic.cli.models import create, lower_resolution, smaller_name
from laconic.core.backbone import find_host
from laconic.core.files import Refusal
from laconic.core.from_dict import WORDS
from laconic.core.method import METHODS, Method, resolve
from laconic.core.suggestions import nearest_names
from laconic.core.token_reduction import Compute, find_reduction

ALWAYS = ("random", "avg-pool")  # the methods that every comparison has, next to those asked for
Kind = Literal["base", "method", "plain", "resolution", "smaller"]


@dataclass(frozen=True)
class Variant:
    """One row of a comparison. ``keep`` is the keep rate of a method, or the one that an alternative matches."""

    name: str
    kind: Kind
    model: nn.Module
    macs: int  # of one image
    parameters: int
    tokens: tuple[int, ...]  # patch tokens at the start, then after each block that reduces
    image: tuple[int, int]
    keep: float | None = None

    @property
    def label(self) -> str:
        """A name that no other variant of the comparison has."""
        return label_of(self.name, self.keep)


def label_of(name: str, keep: float | None) -> str:
    """Return the label of a row: its name, with the keep rate if it has one."""
    return name if keep is None else f"{name} {keep:g}"


def size_of(image: tuple[int, int]) -> int | str:
    """Return an input size as timm's result files have it: one number if it is square."""
    height, width = image
    return height if height == width else f"{height}x{width}"


def parse_methods(names: Sequence[str], options: Sequence[str]) -> list[Method]:
    """Return configs for method names and ``[METHOD.]NAME=VALUE`` options; without METHOD. an option is for all that have it.

    Raises:
        Refusal: an option that is not of this form, or that none of the methods has.
        LookupError, TypeError, ValueError: an unknown method, an option's value.
    """
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in chosen:
        resolve(name, {})
    for text in options:
        left, equals, value = text.partition("=")
        target, dot, option = left.rpartition(".")
        if not equals or not option:
            raise Refusal(f"--options {text!r}: expected NAME=VALUE or METHOD.NAME=VALUE, e.g. similarity=previous-attention")
        takers = [target] if dot else [name for name in chosen if option in _fields(name)]
        if not takers or takers[0] not in chosen or option not in _fields(takers[0]):
            known = sorted({field for name in chosen for field in _fields(name)})
            raise Refusal(
                f"--options {text!r}: {target or ' and '.join(chosen)} has no such option here."
                f"{nearest_names(option, known)} The options of {', '.join(chosen)}: {', '.join(known) or 'none'}"
            )
        for name in takers:
            chosen[name][option] = _value(name, option, value)
    return [resolve(name, given) for name, given in chosen.items()]


def _fields(method: str) -> list[str]:
    return [field.name for field in dataclasses.fields(METHODS[method].config)] if method in METHODS else []


def _value(method: str, option: str, text: str) -> Any:
    """Return the value of an option as its config declares it: Python's literals, true, false and none, or else a word."""
    word = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        value = text
    hint = typing.get_type_hints(METHODS[method].config)[option]
    if not _fits(value, hint):
        raise Refusal(f"--options {option}={text}: {option} of {method} must be {in_words(hint)}, not {text}")
    return value


def in_words(hint: Any) -> str:
    """Return the values that an annotation takes, as they are typed: ``cosine or previous-attention``, ``a number or none``."""
    *others, last = dict.fromkeys(_alternatives(hint))
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> Iterator[str]:
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        yield from (str(value) for value in inside)
    elif kind in (types.UnionType, typing.Union):
        for option in inside:
            if not (option is int and float in inside):  # both are numbers
                yield from _alternatives(option)
    elif kind is tuple:
        yield f"several of {in_words(inside[0])} as (A, B)" if typing.get_origin(inside[0]) is Literal else "numbers as (1, 2)"
    elif hint in (None, types.NoneType):
        yield "none"
    else:
        yield WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _fits(value: Any, hint: Any) -> bool:
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return value in inside
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inside)
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(item, inside[0]) for item in value)
    exact = type(value) is (type(None) if hint is None else hint)
    return exact or (hint is float and type(value) is int)


# ------------------------------------------------------------------------------------------------ building them
def unreduced(name: str, model: Any, kind: Kind = "base", keep: float | None = None) -> Variant:
    """Return the row of a model as it is."""
    cost = summary(model)
    return Variant(name, kind, model, cost.macs, cost.parameters, (cost.tokens[0],), _image(model), keep)


def class_row_only(model: nn.Module) -> Variant | None:
    """Return the row of the unreduced model with its last block computed for the class token alone, or None.

    It is the stronger base: exact, and free if nothing but the class token is read (None if more than that is read). Its
    multiply-adds are those that are run.
    """
    host, entry = find_host(model)
    if not entry.head_reads_prefix_only or entry.pooling(host)[0] != "token":
        return None
    copy = reduce_(shared_copy(model), "random", keep=1.0, compute="needed")
    plain = unreduced("unreduced, class row only", copy, "plain")
    return dataclasses.replace(plain, macs=counted(copy, compute="needed"))


def pairs(configs: Sequence[Method], keeps: Sequence[float]) -> list[tuple[Method, float | None]]:
    """Return every method at every keep rate; a method without a keep rate once."""
    return [(config, keep) for config in configs for keep in (dict.fromkeys(keeps) if config.accepts_keep else (None,))]


def reduced(
    model: nn.Module, config: Method, keep: float | None, kind: Kind = "method", compute: Compute | None = None
) -> Variant:
    """Return the row of a copy of the model, with the same weights, under a method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copy = reduce_(shared_copy(model), config, keep=keep, compute=compute)
    return as_reduced(config.info.name, copy, keep, kind)


def as_reduced(name: str, model: nn.Module, keep: float | None, kind: Kind = "method") -> Variant:
    """Return the row of a reduced model."""
    reduction, cost = find_reduction(model), summary(model)
    assert reduction is not None
    variant = Variant(name, kind, model, cost.macs, cost.parameters, (), _image(model), keep)
    if reduction.config.info.count == "variable":
        host, entry = find_host(model)
        return as_observed(variant, observe(model, whole_batch(host, entry.example(host))))
    start = math.prod(reduction.grid)
    return dataclasses.replace(variant, tokens=(start, *(cost.tokens[block] for block in reduction.schedule.at)))


def as_observed(variant: Variant, seen: Observed) -> Variant:
    """Return the row of a method with a count for each image, with the mean tokens and cost over the images."""
    reduction = find_reduction(variant.model)
    assert reduction is not None
    left = (round(seen.tokens[block].mean) for block in reduction.schedule.at)
    start = math.prod(reduction.grid)
    return dataclasses.replace(variant, macs=round(seen.macs.mean), tokens=(start, *left))


def alternatives(
    name: str, model: nn.Module, keeps: Sequence[float], make: Callable[[str], nn.Module] = create
) -> tuple[list[Variant], list[str]]:
    """Return random pruning, average pooling and a lower resolution for each keep rate, the next smaller model, and notes.

    ``make`` makes the smaller model from its name.
    """
    rows, notes = list[Variant](), list[str]()
    for keep in keeps:
        for method in ALWAYS:
            try:
                rows.append(reduced(model, resolve(method, {}), keep, "plain"))
            except (ValueError, LookupError) as error:
                notes.append(f"no {method} row: {error}")
        small = lower_resolution(model, mean_tokens(model, keep))
        if small is None:
            notes.append("no lower resolution row: timm cannot change the input size of this model")
        else:
            size = _image(small)
            rows.append(unreduced(f"input {size[0]}x{size[1]}", small, "resolution", keep))
    smaller = smaller_name(name)
    if smaller is None:
        notes.append(f"no smaller model row: timm has no smaller model in the family of {name}")
    else:
        rows.append(unreduced(smaller, make(smaller), "smaller"))
    return rows, list(dict.fromkeys(notes))


def mean_tokens(model: nn.Module, keep: float) -> float:
    """Return the mean number of patch tokens that blocks keep at a keep rate, counted as random pruning does."""
    config, unreduced_ = resolve("random", {}), summary(model).tokens
    depth, patches = len(unreduced_), unreduced_[0]
    return sum(config.default_schedule(depth, keep, None).counts(depth, patches, config.num_kept)) / depth


def _image(model: Any) -> tuple[int, int]:
    host, entry = find_host(model)
    height, width = entry.example(host).shape[2:]
    return height, width
