"""`doctor`: try every method on a copy of a model, and report which work and why the others do not."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laconic.analysis.break_even import quiet
from laconic.api import reduce_, restore_
from laconic.core.backbone import ModelSpec, block_spec, find_host, path_of
from laconic.core.method import METHODS, MethodInfo, resolve
from laconic.core.method import methods as all_methods
from laconic.core.text_table import by
from laconic.core.token_reduction import TokenReduction, find_reduction, reduction_of

KEEP = 0.7  # the keep rate for trying methods
IDENTITY = "dynamicvit"  # reduces before a block, so it runs on every backbone; with keep=1 outputs must not change


@dataclass(frozen=True)
class Trial:
    """The result of one method on this model: the options it works with, or the reason why it does not work."""

    method: str
    works: bool
    options: dict[str, str]
    reason: str  # empty if it works
    tokens: tuple[int, ...]  # patch tokens that each reducing block keeps at the model's own input size, at most

    @property
    def example(self) -> str:
        """A line of code that reduces this model; empty if the method does not work."""
        if not self.works:
            return ""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        keep = f", keep={KEEP}" if METHODS[self.method].count == "constant" else ""
        return f'laconic.reduce_(model, "{self.method}"{keep}{options})'


@dataclass(frozen=True)
class Report:
    """The findings of `doctor`. For an unsupported model, ``refusal`` is the reason, and the other fields are empty."""

    model: str
    refusal: str = ""
    host: str = ""
    blocks: tuple[str, ...] = ()  # the class of every block
    prefix: int = 0
    has_cls: bool = False
    positions: str = ""
    grid: tuple[int, ...] = (0, 0)
    dim: int = 0
    heads: int = 0
    pooling: str = ""
    self_test: str = ""  # "passed", or the error
    trials: tuple[Trial, ...] = ()

    @property
    def supported(self) -> bool:
        """True if laconic knows this model and its self-test passes."""
        return not self.refusal and self.self_test == "passed"

    def facts(self) -> dict[str, str]:
        """Return the properties of the model as text, by name."""
        kinds = dict.fromkeys(self.blocks)
        return {
            "model": self.model,
            "host": self.host,
            "blocks": f"{len(self.blocks)} of {' and '.join(kinds)}",
            "width": f"{self.dim} channels, {self.heads} heads",
            "patches": f"{by(self.grid)} = {math.prod(self.grid)}",
            "prefix tokens": f"{self.prefix} ({'the first is a class token' if self.has_cls else 'no class token'})",
            "positions": self.positions,
            "pooling": self.pooling,
            "self-test": self.self_test,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        trials = [{**dataclasses.asdict(t), "tokens": list(t.tokens), "example": t.example} for t in self.trials]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "supported": self.supported, "blocks": list(self.blocks), "grid": list(self.grid), "trials": trials}

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.model}: {self.refusal}"
        lines = [f"{name + ':':<15}{value}" for name, value in self.facts().items()]
        return "\n".join(lines + [f"{t.method + ':':<15}{t.example or 'no: ' + t.reason}" for t in self.trials])


def doctor(model: nn.Module, methods: Iterable[str] | None = None) -> Report:
    """Examine a model: what kind of host it is, and for every method whether it works on it or the reason why not.

    The model is not changed: methods are tried on copies that share its weights. A reduced model is examined as it was
    before the reduction. For an unsupported model the report has the reason.

    Args:
        model: the model.
        methods: names of the methods to try (default: all), each taken from the iterable just before it is tried.

    Raises:
        TypeError: not a torch.nn.Module. LookupError: an unknown method.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; create the model first (timm.create_model)")
    known = all_methods()
    if methods is not None and not isinstance(methods, Iterator):
        methods = list(methods)
        for chosen in methods:
            resolve(chosen, {})
    name = path_of(type(model))
    model = shared_copy(model)
    if find_reduction(model) is not None:
        restore_(model)
    try:
        host, entry = find_host(model)
    except (TypeError, ValueError) as error:
        return Report(name, refusal=str(error).removeprefix(f"{name} cannot be reduced: "))
    blocks = entry.blocks(host)
    pool, with_prefix = entry.pooling(host)
    identity = _attempt(model, IDENTITY, 1.0, {})
    prefix, has_cls = entry.prefix(host)
    return Report(
        name,
        host=path_of(type(host)),
        blocks=tuple(path_of(type(block)) for block in blocks),
        prefix=prefix,
        has_cls=has_cls,
        positions=_positions(host, entry, blocks),
        grid=entry.grid(host),
        dim=entry.dim(host),
        heads=entry.heads(host),
        pooling=f"{pool}{', prefix tokens included' if with_prefix else ''}",
        self_test=identity if isinstance(identity, str) else "passed",
        trials=tuple(_try(model, known[chosen]) for chosen in (known if methods is None else methods)),
    )


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy with its own modules that shares the weights: reducing it does not change the original, or copy weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _positions(host: Any, entry: ModelSpec, blocks: list[nn.Module]) -> str:
    specs = [block_spec(block) for block in blocks]
    rotary, own_tables = any(spec.rope is not None for spec in specs), any(spec.origin is not None for spec in specs)
    kinds = ["absolute"] * (entry.positions(host) is not None)
    tables = (getattr(host, name, None) for name in ("rope", "rope_embeddings"))  # timm's, transformers'
    kinds += ["rotary"] * (own_tables or (rotary and any(table is not None for table in tables)))
    return " and ".join(kinds) or "none"


def _try(model: nn.Module, info: MethodInfo) -> Trial:
    options: dict[str, Any] = {}
    keep = KEEP if info.count == "constant" else None  # the others choose the count per image
    reduced = _attempt(model, info.name, keep, options)
    if isinstance(reduced, str) and "score" in (f.name for f in dataclasses.fields(info.config)):
        fallback = {"score": "mean-query"}  # for backbones without a class token
        again = _attempt(model, info.name, keep, fallback)
        reduced, options = (reduced, options) if isinstance(again, str) else (again, fallback)
    if isinstance(reduced, str):
        return Trial(info.name, False, {}, reduced, ())
    counts = reduced.counts()
    return Trial(info.name, True, options, "", tuple(counts[block] for block in reduced.schedule.at))


def _attempt(model: nn.Module, method: str, keep: float | None, options: dict[str, Any]) -> TokenReduction | str:
    """Reduce a copy; return its reduction, or the reason why the method does not work on this model."""
    try:
        with (
            quiet(),
            torch.random.fork_rng(devices=[]),
            # a learned scorer draws its first weights; the global generator must not change
        ):
            return reduction_of(reduce_(shared_copy(model), method, keep=keep, compute="all", **options))
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        return str(error)
