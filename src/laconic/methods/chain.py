"""`Chain`: several methods in one model, one after the other, each with a schedule of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from laconic.core.attention import AttentionView
from laconic.core.block_context import BlockContext
from laconic.core.half_limit import check_halves
from laconic.core.method import COMPOSED, PHASES, Method, MethodInfo, Reads, Reducer, Unregistered, resolve
from laconic.core.patch_input import PatchInput
from laconic.core.schedule import ChainSchedule, Schedule
from laconic.core.tokens import Tokens
from laconic.core.values import items, shown

OWN = ("keep", "at", "schedule")  # arguments of a part besides the options of its method
ORDER = PHASES[:5]  # the phases in the order in which a block runs them
RETURNING = ("parked", "skipped")  # of `MethodInfo.rest`: tokens come back, so the next method would not know their number


@dataclass(frozen=True)
class ChainContext(BlockContext):
    """The context of a block in a chain: the values of the block's first method, and the contexts of all its methods."""

    chain: ChainSchedule | None = None
    parts: tuple[tuple[int, BlockContext], ...] = ()  # number of the method in the chain, and its context


class InTurn(Reducer):
    """The reducers of several methods at one block, each in its own phases."""

    reads: Reads = "anywhere"

    def __init__(self, config: Chain, reducers: Mapping[int, Reducer]) -> None:
        super().__init__()
        first, second = list(reducers)[:2]
        both = (reducers[first].phases & reducers[second].phases) - {"watch"}
        if both or len(reducers) > 2:
            names = " and ".join(config.members[number].info.name for number in reducers)
            raise ValueError(f"chain: {names} work in the same phase of one block ({', '.join(sorted(both))}); change at")
        self.config = config
        self.inner = nn.ModuleDict({str(number): reducer for number, reducer in reducers.items()})
        self.phases = frozenset[str]().union(*(reducer.phases for reducer in reducers.values()))  # type: ignore[misc]
        self.straight_through = any(reducer.straight_through for reducer in reducers.values())  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "site":
            for number, context in value.parts:
                reducer: Any = self.inner[str(number)]
                reducer.site = context
        super().__setattr__(name, value)

    def _run(self, phase: str, tokens: Any, patches: int, length: int, *seen: Any) -> Any:
        site: Any = self.site
        counts = self.config.counts_of_parts(site.chain, site.depth, patches)
        inner: Any = self.inner
        for name, reducer in inner.items():
            n = counts[int(name)][site.block]
            if phase in reducer.phases and reducer.active(length, n):
                return getattr(reducer, phase)(tokens, *seen, n)
        return tokens

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        count = patches.embeddings.shape[1]
        out: PatchInput = self._run("embed", patches, count, count)
        return out

    def before(self, tokens: Tokens, n: int) -> Tokens:
        out: Tokens = self._run("before", tokens, tokens.token_of_patch.shape[1], len(tokens))
        return out

    def ahead(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        out: Tokens = self._run("ahead", tokens, tokens.token_of_patch.shape[1], len(tokens), seen)
        return out

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        out: Tokens = self._run("between", tokens, tokens.token_of_patch.shape[1], len(tokens), seen)
        return out

    def after(self, tokens: Tokens, n: int) -> Tokens:
        out: Tokens = self._run("after", tokens, tokens.token_of_patch.shape[1], len(tokens))
        return out

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        for reducer in self.inner.values():
            tokens = reducer.watch(tokens, seen)  # type: ignore[operator]
        return tokens

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        return {name: loss for one in self.inner.values() for name, loss in one.losses(tokens, rate).items()}  # type: ignore[operator]

    def active(self, before: int, n: int) -> bool:
        return any(reducer.active(before, n) for reducer in self.inner.values())  # type: ignore[operator]


@dataclass(frozen=True, init=False)
class Chain(Method):
    """Methods one after the other: ``Chain(("pre-merge", {"keep": 0.5}), ("tome", {"keep": 0.7, "at": [3, 6, 9]}))``.

    Each part is a method (its name or config), or a pair of it and its arguments: its options, and ``keep``, ``at`` or
    ``schedule`` as for `laconic.reduce_`. Every method works as if the tokens that reach its first block were the patches of
    the image, so its counts are those of its own schedule. A method must end before the next one begins; two methods may
    share the block between them if the first works in an earlier phase of it (before the block, between attention and MLP).

    Raises:
        ValueError: fewer than two parts, or a combination that cannot run: a method that brings tokens back before another,
            a method of constant counts after one whose counts depend on the image, two values of ``execution``.
        LookupError, TypeError: as `laconic.reduce_` for a method and its options.
    """

    parts: tuple[Any, ...] = ()  # (name of the method, its arguments)
    members: tuple[Method, ...] = field(default=(), init=False, compare=False, repr=False)

    accepts_keep: ClassVar[bool] = False

    def __init__(self, *members: Any, parts: Sequence[Any] = ()) -> None:
        read = [_read(part) for part in (*members, *parts)]
        object.__setattr__(self, "parts", tuple((_name(config), arguments) for config, arguments in read))
        object.__setattr__(self, "members", tuple(config for config, _ in read))
        if len(read) < 2:
            raise ValueError(
                f"a chain needs two methods or more, and got {len(read)}: "
                'laconic.Chain(("pre-merge", {"keep": 0.5}), ("tome", {"keep": 0.7}))'
            )
        self._check()
        object.__setattr__(self, "info", _facts(self.members))

    def __hash__(self) -> int:
        return hash(json.dumps(self.describe(), sort_keys=True, default=repr))

    def _check(self) -> None:
        for member in self.members:
            if member.batch_multiple > 1:
                raise ValueError(
                    f"chain: {member.info.name} on single frames lets tokens of later frames share those of earlier ones, and "
                    "another method would drop or merge them in each frame separately; use it alone"
                )
        for first, second in zip(self.members, self.members[1:], strict=False):
            if first.info.rest in RETURNING:
                raise ValueError(f"chain: {first.info.name} brings its tokens back later, so it can only be the last method")
            if first.is_adaptive and not second.is_adaptive:
                raise ValueError(
                    f"chain: {second.info.name} keeps the same number of tokens of every image and cannot follow "
                    f"{first.info.name}, which keeps another number of each; put it first, or use an adaptive method (ats)"
                )
        if len({member.execution for member in self.members if member.is_adaptive}) > 1:  # type: ignore[attr-defined]
            raise ValueError("chain: all adaptive methods must have the same execution (packed, padded or masked)")
        if len({member.bucket for member in self.members if member.is_adaptive}) > 1:  # type: ignore[attr-defined]
            raise ValueError("chain: all adaptive methods must have the same bucket")

    def describe(self) -> dict[str, Any]:
        return {"name": "chain", "options": {"parts": [[name, arguments] for name, arguments in self.parts]}}

    # ------------------------------------------------------------------------------------------------ facts of all methods
    @property
    def is_adaptive(self) -> bool:
        return any(member.is_adaptive for member in self.members)

    @property
    def execution(self) -> str:
        """The execution of its adaptive methods."""
        return next((member.execution for member in self.members if member.is_adaptive), "packed")  # type: ignore[attr-defined]

    @property
    def bucket(self) -> int:
        """The multiple that padded lengths of its adaptive methods are rounded up to."""
        return next((member.bucket for member in self.members if member.is_adaptive), 1)  # type: ignore[attr-defined]

    @property
    def compacts(self) -> bool:
        """True if hidden tokens may be removed for good."""
        return all(getattr(member, "compacts", True) for member in self.members if member.is_adaptive)

    @property
    def reads_positions(self) -> bool:
        return any(member.reads_positions for member in self.members)

    def trial(self, image: Tensor) -> Tensor:
        return self.members[0].trial(image)

    def may_rise(self) -> bool:
        return any(member.may_rise() for member in self.members)

    def loss_weights(self) -> Mapping[str, float]:
        return {name: weight for member in self.members for name, weight in member.loss_weights().items()}

    # ------------------------------------------------------------------------------------------------ schedules
    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if keep is not None or at is not None:
            raise ValueError(
                "chain: keep and at belong to each method of the chain: "
                'laconic.Chain(("pre-merge", {"keep": 0.5}), ("tome", {"keep": 0.7, "at": [3, 6, 9]}))'
            )
        schedules = list[Schedule]()
        for member, (_, arguments) in zip(self.members, self.parts, strict=True):
            own = arguments.get("schedule")
            given = None if own is None else Schedule.of(own)
            schedules.append(given or member.default_schedule(depth, arguments.get("keep"), arguments.get("at")))
        schedule = ChainSchedule.join(schedules)
        self._check_order(schedule, depth)
        return schedule

    def _check_order(self, schedule: ChainSchedule, depth: int) -> None:
        previous: tuple[Method, Sequence[int]] | None = None
        for member, part in zip(self.members, schedule.parts, strict=True):
            if part is None:
                continue
            blocks = member.reducer_blocks(part, depth)
            if previous is not None:
                first, last = previous[0].info, previous[1][-1]
                shared = last == blocks[0] and ORDER.index(first.phase) < ORDER.index(member.info.phase)
                if last >= blocks[0] and not shared:
                    raise ValueError(
                        f"chain: {first.name} works up to block {last} ({first.phase}), and {member.info.name} begins at block "
                        f"{blocks[0]} ({member.info.phase}); a method must end before the next one begins: change at"
                    )
            previous = member, blocks

    def counts_of_parts(self, schedule: Schedule, depth: int, patches: int) -> list[tuple[int, ...]]:
        """Return the patch tokens that each block keeps, for each method alone on the tokens that reach its first block."""
        if not isinstance(schedule, ChainSchedule) or len(schedule.parts) != len(self.members):
            raise ValueError(f"chain: the schedule must have one part for each of its {len(self.members)} methods")
        out = list[tuple[int, ...]]()
        for member, part in zip(self.members, schedule.parts, strict=True):
            counts = (patches,) * depth if part is None else member.counts(part, depth, patches)
            if part is not None:
                check_halves(member, part, counts, patches)
            out.append(counts)
            patches = counts[-1]
        return out

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        parts: Any = schedule
        out = [patches] * depth
        for part, counts in zip(parts.parts, self.counts_of_parts(schedule, depth, patches), strict=True):
            if part is not None:
                out[part.at[0] :] = counts[part.at[0] :]
        return tuple(out)

    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        parts: Any = schedule
        blocks = {
            block
            for member, part in zip(self.members, parts.parts, strict=True)
            if part is not None
            for block in member.reducer_blocks(part, depth)
        }
        return sorted(blocks)

    def targets(self, schedule: Schedule, depth: int, patches: int) -> dict[int, float]:
        parts: Any = schedule
        each, out, before = self.counts_of_parts(schedule, depth, patches), dict[int, float](), patches
        for member, part, counts in zip(self.members, parts.parts, each, strict=True):
            if part is not None:
                out |= member.targets(part, depth, before)
            before = counts[-1]
        return out

    # ------------------------------------------------------------------------------------------------ blocks
    def context(self, site: BlockContext) -> BlockContext:
        chain: Any = site.schedule
        if not isinstance(chain, ChainSchedule):
            raise ValueError("chain: each method of a chain has its own schedule; give keep, at or schedule to each")
        given = {field.name: getattr(site, field.name) for field in dataclasses.fields(BlockContext)}
        patches, found = math.prod(site.grid), list[tuple[int, BlockContext]]()
        each = self.counts_of_parts(chain, site.depth, patches)
        for number, (member, counts) in enumerate(zip(self.members, each, strict=True)):
            part: Any = chain.parts[number]
            blocks = () if part is None else tuple(member.reducer_blocks(part, site.depth))
            if site.block in blocks:
                rates = dict(zip(part.at, part.values, strict=True)) if part.unit == "keep" else {}
                own = {"ordinal": blocks.index(site.block), "keep": rates.get(site.block), "schedule": part}
                own |= {"before": counts[site.block - 1] if site.block > blocks[0] else patches, "after": counts[site.block]}
                found.append((number, BlockContext(**{**given, **own})))
            patches = counts[-1]
        first = {field.name: getattr(found[0][1], field.name) for field in dataclasses.fields(BlockContext)}
        return ChainContext(**first, chain=chain, parts=tuple(found))

    def build(self, site: BlockContext) -> Reducer:
        parts: Any = site
        reducers = {number: self.members[number].build(context) for number, context in parts.parts}
        return next(iter(reducers.values())) if len(reducers) == 1 else InTurn(self, reducers)

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        parts: Any = site
        inside = [self.members[number].tokens_inside(own.before, own.after, own) for number, own in parts.parts]
        return inside[0][0] if len(inside) == 1 else min(at for at, _ in inside), inside[-1][1]

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        parts: Any = site
        total = dict[str, int]()
        for number, own in parts.parts:
            if own.after < own.before or self.members[number].is_adaptive:
                for kind, count in self.members[number].macs(own.before, own.after, own).items():
                    total[kind] = total.get(kind, 0) + count
        return total


def _read(part: Any) -> tuple[Method, dict[str, Any]]:
    """Return the config of a part, and its arguments as plain values."""
    pair = (part,) if isinstance(part, str) else items(part)
    method, given = (part, {}) if pair is None else (pair[0], pair[1] if len(pair) == 2 else {} if len(pair) == 1 else None)
    if not isinstance(given, Mapping):
        raise TypeError(f"chain: a part is a method, or a pair of a method and a dict of its arguments, not {shown(part)}")
    options = {name: _plain(value, tuple) for name, value in given.items() if name not in OWN}
    config = resolve(method, options)
    own = {name: given[name] for name in OWN if given.get(name) is not None}
    if "schedule" in own:
        if len(own) > 1:
            raise ValueError(f"chain: give {config.info.name} either schedule, or keep (and at), not both")
        own["schedule"] = Schedule.of(own["schedule"]).to_json()
    fields = {} if isinstance(config, Unregistered) else config.describe()["options"]
    return config, {name: _plain(value, list) for name, value in {**fields, **own}.items()}


def _plain(value: Any, kind: Any) -> Any:
    """Return sequences inside a value as ``kind``: lists in JSON, tuples in options."""
    if isinstance(value, Mapping):
        return {name: _plain(one, kind) for name, one in value.items()}
    many = None if isinstance(value, str) else items(value)
    return value if many is None else kind(_plain(one, kind) for one in many)


def _name(config: Method) -> Any:
    return config if isinstance(config, Unregistered) else config.info.name


def _facts(members: Sequence[Method]) -> MethodInfo:
    rows = [member.info for member in members]
    title = ", then ".join(row.name for row in rows)
    phase = next((phase for phase in ("between", "after", "ahead") if any(row.phase == phase for row in rows)), "before")
    flags = {name: any(getattr(row, name) for row in rows) for name in ("trained", "learns", "class_readout", "full_attention")}
    count = "variable" if any(row.count == "variable" for row in rows) else "constant"
    return MethodInfo(f"chain ({title})", title, "", Chain, phase, "none", rows[-1].rest, count=count, **flags)  # type: ignore[arg-type]


Chain.info = MethodInfo("chain", "several methods, one after the other", "", Chain, "before", "none", "dropped", trained=False)
COMPOSED["chain"] = Chain
