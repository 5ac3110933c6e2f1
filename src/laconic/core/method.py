"""What a method is: a config (`Method`) that builds one `Reducer` for each block it works at.

A reducer decides who goes where with what weight and calls a verb of `Tokens`. It knows no backbone and no schedule.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from laconic.core.attention import AttentionView
from laconic.core.block_context import BlockContext as BlockContext
from laconic.core.from_dict import fit_options
from laconic.core.plugins import discover
from laconic.core.schedule import Schedule, quarters
from laconic.core.tokens import Tokens
from laconic.core.values import nearest_names as nearest_names

Reads = Literal["anywhere", "keys", "class"]
Score = Literal["attention", "similarity", "learned", "position", "features", "none"]  # of what a token is scored by
Rest = Literal["dropped", "merged", "squeezed", "mixed", "parked"]  # of what happens to tokens that are not kept
PHASES = ("before", "ahead", "between", "after", "watch")
ARGUMENTS = ("keep", "at", "schedule", "budget", "restore", "compute", "example")  # of `laconic.reduce_`, for suggestions


OLD_HOOKS = {  # methods of `Method` in version 0.1
    "leaves": "num_kept",
    "works_at": "reducer_blocks",
    "inside": "tokens_inside",
    "plan": "default_schedule",
    "official": "convert_official",
    "takes_keep": "accepts_keep",
}


class Reducer(nn.Module):
    """A method at one block. Override the moments it needs; ``n`` is the number of patch tokens to leave.

    Laws that every reducer must keep: nothing but `Tokens` verbs changes the number of tokens; no state between calls;
    images do not see each other; no data-dependent shapes. A moment is called only where there is something to reduce
    (``n < len(tokens)``). Each block leaves ``n`` patch tokens, or as many as it got with ``alive`` set (training).
    ``site`` says where it stands and with which keep rate now; it is set when a schedule is.
    """

    site: BlockContext
    straight_through: ClassVar[bool] = True  # do gradients flow through its decisions in training?
    # What it decides by. "keys": between the halves alone, by no more of `AttentionView` than keys, values and the class query, and by
    # no features, which it may merge. "class": likewise, and all it does is to keep tokens. Then the house may let it decide
    # before there are features, and spare what those would have cost that nobody reads
    reads: Reads = "anywhere"
    phases: ClassVar[frozenset[str]] = frozenset()  # those that the class overrides

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.phases = frozenset(m for m in PHASES if getattr(cls, m) is not getattr(Reducer, m))

    def before(self, tokens: Tokens, n: int) -> Tokens:
        """At the input of the block (inter-block methods)."""
        return tokens

    def ahead(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        """At the input of the block, with a look at the attention that it would compute of these tokens."""
        return tokens

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        """After the attention residual, before the MLP (intra-block methods)."""
        return tokens

    def after(self, tokens: Tokens, n: int) -> Tokens:
        """At the output of the block."""
        return tokens

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        """A look at the attention of the block *before* this one, to note something in a column."""
        return tokens

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        """Extra training losses by name, from the tokens this block left; ``rate`` is the share of patches to keep here."""
        return {}

    def active(self, before: int, n: int) -> bool:
        """Whether there is anything to do where ``before`` patch tokens come in and ``n`` are to be left."""
        return n < before

    def overrides(self, moment: str) -> bool:
        """Whether this method works at that moment."""
        return moment in self.phases


class Prune(Reducer):
    """Most papers are a pair: how tokens are scored, and what becomes of the rest (``reads``: see `Reducer`)."""

    def __init__(
        self,
        score: Callable[[Tokens, AttentionView], Tensor],
        rest: Callable[[Tokens, Tensor, int], Tokens],
        reads: Reads = "anywhere",
    ) -> None:
        super().__init__()
        self.score, self.rest, self.reads = score, rest, reads

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return self.rest(tokens, self.score(tokens, seen), n)


@dataclass(frozen=True)
class Method:
    """The options of a method (the one source for Python, the command line and saved models), and its static rules."""

    info: ClassVar[MethodInfo]
    accepts_keep: ClassVar[bool] = True  # is there a keep rate to give it?
    removes_at_most_half: ClassVar[bool] = False  # does it take away half of a block's tokens at most?
    old_options: ClassVar[Mapping[str, str]] = {}  # names of options in version 0.1: what they are called now
    official_model: ClassVar[Mapping[str, Any]] = {}  # how the authors' model differs from a plain DeiT, for timm

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in OLD_HOOKS.items():  # a method written for version 0.1
            if old in vars(cls) and new not in vars(cls):
                warnings.warn(f"{cls.__name__}.{old} is now called {new}", DeprecationWarning, stacklevel=2)
                setattr(cls, new, vars(cls)[old])

    def __post_init__(self) -> None:
        """Check the options by their annotations, and convert them; a method with checks of its own calls this first."""
        info = getattr(type(self), "info", None)
        for option, value in fit_options(self, type(self).__name__ if info is None else info.name).items():
            object.__setattr__(self, option, value)

    @property
    def reads_positions(self) -> bool:
        """True if the method needs the model's absolute position embeddings (`Tokens.positions`)."""
        return False

    def build(self, site: BlockContext) -> Reducer:
        """The reducer for one block."""
        raise NotImplementedError

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        """Patch tokens left of ``n`` by the last of ``rates`` (one a stage so far), having started with ``patches``.

        The default is EViT's: ceil(rate * n), relative to the tokens there are now.
        """
        return math.ceil(rates[-1] * n)

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        """Patch tokens each block leaves; the most that one may leave, where every image has a number of its own."""
        return schedule.counts(depth, patches, self.num_kept)

    def may_rise(self) -> bool:
        """Return True if counts to leave may rise from block to block; a count that is too high is then passed over."""
        return False

    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        """The blocks that have a reducer: those of the schedule, and others where the method has something to note."""
        return schedule.at

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        """Patch tokens at the attention and at the MLP of a reducing block that gets ``before`` and leaves ``after``."""
        if self.info.phase == "between":
            return before, after
        return (before, before) if self.info.phase == "after" else (after, after)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        """The schedule for a keep rate; by default at a quarter, a half and three quarters of the depth."""
        if keep is None:
            taken = "r=8 (tokens taken away in every block), or " if hasattr(self, "r") else ""
            raise ValueError(
                f"{self.info.name}: say how many tokens to keep: {taken}keep=0.7 (a rate for each reducing block), or "
                "schedule=Schedule.keep_counts({3: 138, 6: 97, 9: 68}) for explicit counts"
            )
        return Schedule.rates(keep, quarters(depth) if at is None else at)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        """Multiply-adds of one reduction ``before`` -> ``after`` as published, by kind (see `laconic.analysis.macs`)."""
        return {}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Weights under the names that the authors of the method gave them, under ours (see `laconic.import_checkpoint`)."""
        return dict(weights)

    def loss_weights(self) -> Mapping[str, float]:
        """What losses of its own count beside the cross-entropy; one that is not named counts ``loss.ratio`` of the recipe."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Name and options, as JSON."""
        return {"name": self.info.name, "options": dataclasses.asdict(self)}


@dataclass(frozen=True)
class MethodInfo:
    """One line of the method registry."""

    name: str
    title: str
    paper: str  # arXiv number
    config: type[Method]
    phase: str
    score: Score
    rest: Rest
    trained: bool  # is it meant to be used after training only?
    learns: bool = False  # does it add parameters?
    count: Literal["constant", "variable"] = "constant"  # does every image of a batch keep as many tokens as the others?
    class_readout: bool = False  # is its answer in the class token alone (which it may then change)?
    score_detail: str = ""  # in words, if ``score`` does not say enough
    rest_detail: str = ""
    full_attention: bool = False  # does it need the whole matrix of attention weights?


METHODS: dict[str, MethodInfo] = {}
M = TypeVar("M", bound=type[Method])


@dataclass(frozen=True)
class Unregistered(Method):
    """The method of a reducer that is handed to `laconic.reduce_` itself: every reducing block gets a copy of it.

    Keep rates count as EViT's (`Method.num_kept`). Its multiply-adds are not known, and it cannot be saved.
    """

    reducer: Reducer

    def __post_init__(self) -> None:
        kinds = [phase for phase in PHASES if phase in self.reducer.phases and phase != "watch"]
        if not kinds:
            raise TypeError(f"{type(self.reducer).__name__} overrides none of {', '.join(PHASES[:4])}, so it reduces nothing")
        name, between = type(self.reducer).__name__, "between" in kinds
        learns = next(self.reducer.parameters(), None) is not None
        phase = "between" if between else kinds[0]
        info = MethodInfo(name, name, "", type(self), phase, "none", "dropped", trained=False, learns=learns)
        object.__setattr__(self, "info", info)

    def build(self, site: BlockContext) -> Reducer:
        return copy.deepcopy(self.reducer)

    def describe(self) -> dict[str, Any]:
        return {"name": self.info.name, "options": {}}


def method(name: str, **facts: Any) -> Callable[[M], M]:
    """Register a method config under the name users type; ``facts`` are the fields of `MethodInfo`."""
    if "moment" in facts:
        warnings.warn("method(moment=...) is now method(phase=...)", DeprecationWarning, stacklevel=2)
        facts["phase"] = facts.pop("moment")

    def register(config: M) -> M:
        old = METHODS.get(name)
        if old is not None and (old.config.__module__, old.config.__name__) != (config.__module__, config.__name__):
            raise ValueError(f"a method called {name!r} is there already ({old.config.__module__}); give this one another name")
        config.info = METHODS[name] = MethodInfo(name=name, config=config, **facts)
        return config

    return register


def methods() -> dict[str, MethodInfo]:
    """All methods by name: title, paper, what they do, whether they need training, and the config class.

    Those of other packages are among them (see `laconic.core.plugins`).
    """
    discover()
    return dict(sorted(METHODS.items()))


def renamed_options(config: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names of today; those of version 0.1 get a warning."""
    for name in options:
        if name in config.old_options:
            new = config.old_options[name]
            warnings.warn(f"{config.info.name}: option {name} is now {new}", DeprecationWarning, stacklevel=4)
    return {config.old_options.get(name, name): value for name, value in options.items()}


def resolve(method: str | Method | Reducer, options: dict[str, Any]) -> Method:
    """Return the config for a name and options; a config as it is; and that of a reducer which is not registered.

    Raises:
        LookupError: no such method. TypeError: no such option, or not a method. ValueError: an option's value.
    """
    if isinstance(method, Reducer):
        method = Unregistered(method)
    if isinstance(method, Method):
        if options:
            raise TypeError(f"options {sorted(options)} belong inside the config: {type(method).__name__}(...)")
        return method
    if not isinstance(method, str):
        given = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method must be a name or a config such as laconic.ETPS(), not {given}")
    if method not in METHODS:
        discover()
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise LookupError(f"no method is called {method!r}.{nearest_names(method, list(METHODS))} There are: {known}")
    config = METHODS[method].config
    options = renamed_options(config, options)
    known_options = [f.name for f in dataclasses.fields(config)]
    for name in options:
        if name not in known_options:
            candidates = [*known_options, *difflib.get_close_matches(name, ARGUMENTS, cutoff=0.6)]
            raise TypeError(
                f"{method} has no option {name!r}.{nearest_names(name, candidates)} "
                f"Its options: {', '.join(known_options) or 'none'}"
            )
    return config(**options)
