"""The candidates of `laconic.tune`: an input size, a method, and the blocks at which it reduces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from laconic.analysis.diagnose import shared_copy
from laconic.core.backbone import find_host
from laconic.core.method import METHODS, Method, resolve
from laconic.core.plugins import discover
from laconic.core.schedule import Schedule
from laconic.planning.space import ScheduleFamily, ScheduleSpace

SHARES = (1.0, 0.93, 0.87, 0.81, 0.75, 0.68, 0.62, 0.56, 0.5, 0.43)  # sides of smaller inputs, as shares of the model's own
SELECTING = ("etps", "bat", "evit", "topk")  # keep what the class token attends to
MERGING = ("two-stage", "tome", "atc", "pitome", "pre-merge")  # merge what is similar
BASELINES = ("random", "avg-pool")  # are in every report; they win if nothing is better
FIRST = (0.85, 0.7)  # keep rates of pre-merge before a method that keeps what the class token attends to
REDUCED = 4  # smaller inputs that are combined with methods: beyond them little is left to reduce
Sides = tuple[int, int]


@dataclass(frozen=True)
class Candidate:
    """An input size and, with ``config``, a method and the blocks at which it reduces (None: its usual ones).

    With ``first`` it follows another method, in a `laconic.Chain`. ``weights`` replace ``at`` after a search: how strongly each
    block reduces (see `laconic.planning.search`).
    """

    name: str
    sides: Sides | None = None  # height and width; None: the model's own
    config: Method | None = None
    at: tuple[int, ...] | None = None
    first: tuple[Method, float] | None = None  # a method that reduces before the first block, and its keep rate
    weights: tuple[tuple[int, float], ...] | None = None
    baseline: bool = False  # True for smaller inputs, random pruning and average pooling

    @property
    def is_plain(self) -> bool:
        """True for the unreduced model, at any input size."""
        return self.config is None


@dataclass
class Sizes:
    """The model at several input sizes, with shared weights; a size that the model does not take is None."""

    model: nn.Module
    known: dict[Sides, nn.Module | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        host, entry = find_host(self.model)
        self.own: Sides = tuple(entry.example(host).shape[2:])  # type: ignore[assignment]
        self.grid = entry.shapes(host)[0].grid

    def smaller(self) -> list[Sides]:
        """Return the smaller input sizes that the model takes, the largest first; they are whole patches."""
        out = list[Sides]()
        for share in SHARES[1:]:
            height, width = (max(1, round(n * share)) * (pixels // n) for n, pixels in zip(self.grid, self.own, strict=True))
            if (height, width) not in (*out, self.own) and self.at((height, width)) is not None:
                out.append((height, width))
        return out

    def at(self, sides: Sides | None) -> nn.Module | None:
        """Return the model for an input size; None if it takes no such images."""
        if sides is None or sides == self.own:
            return self.model
        if sides not in self.known:
            self.known[sides] = _resized(self.model, sides)
        return self.known[sides]


def set_size(model: nn.Module, sides: Sides) -> None:
    """Set the input size of a model, in place; a model that takes images of any size is left as it is.

    Raises:
        ValueError: the model takes no images of this size.
    """
    host: Any = find_host(model)[0]
    try:
        if hasattr(host, "set_input_size"):
            host.set_input_size(img_size=sides)
        reference = next(host.parameters())
        with torch.inference_mode():
            host(torch.zeros(1, find_channels(host), *sides, device=reference.device, dtype=reference.dtype))
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the model takes no images of {sides[0]} x {sides[1]} pixels: {error}") from error


def find_channels(host: nn.Module) -> int:
    """Return the number of channels of the images that a model takes."""
    _, entry = find_host(host)
    return int(entry.example(host).shape[1])


def _resized(model: nn.Module, sides: Sides) -> nn.Module | None:
    other = shared_copy(model)
    try:
        set_size(other, sides)
    except ValueError:
        return None
    return other


def candidates(sizes: Sizes, methods: Sequence[str | Method] | None = None) -> list[Candidate]:
    """Return all candidates on a model: methods at their usual blocks, late, and in small steps, at several input sizes.

    Baselines come first, then the candidates that are often good.

    Methods that do not work on the model are left out when their schedule is fitted.

    Args:
        sizes: the model.
        methods: names or configs to choose from (default: the selecting and merging methods that need no training). If
            pre-merge is among them, it also precedes those that select.
    """
    discover()
    smaller = sizes.smaller()
    depth = sum(shape.depth for shape in find_host(sizes.model)[1].shapes(find_host(sizes.model)[0]))
    out = [Candidate(f"input {label(sides)}", sides, baseline=True) for sides in smaller]
    out += [Candidate(f"{name}, usual blocks", None, resolve(name, {}), baseline=True) for name in BASELINES if name in METHODS]
    chosen = [resolve(one, {}) for one in (methods or (*SELECTING, *MERGING))]
    firsts = [config for config in chosen if config.info.name == "pre-merge"]
    for sides in (None, *smaller[:REDUCED]):
        place = "" if sides is None else f"{label(sides)} px, "
        for config in chosen:
            for words, at in shapes_of(config, depth):
                out.append(Candidate(f"{place}{config.info.name}, {words}", sides, config, at))
            if sides is None and config.info.name in SELECTING:
                words, at = shapes_of(config, depth)[1]
                for first, keep in itertools.product(firsts[:1], FIRST):
                    name = f"{first.info.name} to {keep:.0%}, {config.info.name}, {words}"
                    out.append(Candidate(name, None, config, at, (first, keep)))
    return sorted(out, key=lambda candidate: -1 if candidate.baseline else likelihood(candidate, smaller))


def shapes_of(config: Method, depth: int) -> list[tuple[str, tuple[int, ...] | None]]:
    """Return the blocks at which a method may reduce: the usual ones, late ones, and a run of blocks in small steps.

    A method that reduces before the first block has its own blocks.
    """
    if config.accepts_keep and config.default_schedule(depth, 0.5, None).at[0] == 0:
        return [("usual blocks", None)]
    late = tuple(dict.fromkeys(round(depth * share) for share in (1 / 2, 2 / 3, 5 / 6)))
    run = tuple(range(max(1, depth // 3), max(2, math.ceil(depth * 5 / 6))))
    early = tuple(range(max(1, depth // 4), max(2, math.ceil(depth * 3 / 4))))
    found: dict[tuple[int, ...] | None, str] = {None: "usual blocks"}
    for at in (late, run, early):
        found.setdefault(at, "blocks " + " ".join(map(str, at)))
    merging = config.info.rest == "merged" and config.info.score == "similarity"
    wanted = (None, run, early) if merging else (None, late, run)
    return [(found[at], at) for at in wanted if at in found]


def likelihood(candidate: Candidate, sizes: Sequence[Sides]) -> int:
    """Return a rank that is lower for candidates that are often good: of the method, plus that of the input size.

    Methods that merge and methods that select take turns, since the measure decides between them.
    """
    assert candidate.config is not None
    turns = [name for pair in itertools.zip_longest(MERGING, SELECTING) for name in pair if name is not None]
    name = candidate.config.info.name
    method = turns.index(name) if name in turns else len(turns)
    return method + (0 if candidate.sides is None else 1 + sizes.index(candidate.sides))


def family_of(space: ScheduleSpace, candidate: Candidate) -> ScheduleFamily:
    """Return the schedules of a candidate by a rate: equal keep rates, equal steps over its blocks, or those of a search."""
    if candidate.weights is not None:
        return space.weighted(dict(candidate.weights))
    return space.usual() if candidate.at is None else space.weighted(dict.fromkeys(candidate.at, 1.0))


def fitted(space: ScheduleSpace, candidate: Candidate, limit: float) -> Schedule | None:
    """Return the schedule of a candidate that just meets a limit of multiply-adds; None if it cannot, or needs no reduction."""
    try:
        family = family_of(space, candidate)
        if space.cost(family(1.0)) <= limit:
            return None  # the smaller input alone meets the limit
        schedule = space.fit(family, limit)
    except (ValueError, LookupError, TypeError):  # the method does not fit the model, or can follow no such schedule
        return None
    return None if schedule is None else space.simplify(schedule)


def label(sides: Iterable[int]) -> str:
    """Return a size as text: 182, or 182x224."""
    height, width = sides
    return str(height) if height == width else f"{height}x{width}"
