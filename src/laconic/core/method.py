"""The base classes of methods: a config (`Method`) builds one `Reducer` for each reducing block.

A reducer decides which tokens are kept, dropped or merged, and with what weights, and calls a verb of `Tokens`. It depends on
no backbone and no schedule.
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
from laconic.core.patch_input import PatchInput
from laconic.core.plugins import discover
from laconic.core.schedule import Schedule, quarters
from laconic.core.suggestions import nearest_names
from laconic.core.tokens import Tokens

Reads = Literal["anywhere", "keys", "class"]
Score = Literal[
    "class attention", "attention", "similarity", "learned", "position", "features", "none"
]  # of what a token is scored by
Rest = Literal[
    "dropped", "dropped and merged", "merged", "squeezed", "mixed", "parked", "skipped"
]  # of what happens to tokens that are not kept
PHASES = ("embed", "before", "ahead", "between", "after", "watch")
ARGUMENTS = ("keep", "at", "schedule", "budget", "restore", "compute", "example")  # those of `laconic.reduce_`, for messages

OLD_FACTS = {"moment": "phase"}  # arguments of `method` in version 0.1
OLD_HOOKS = {  # methods of `Method` in version 0.1
    "leaves": "num_kept",
    "works_at": "reducer_blocks",
    "inside": "tokens_inside",
    "plan": "default_schedule",
    "official": "convert_official",
    "takes_keep": "accepts_keep",
}


class Reducer(nn.Module):
    """A method at one block. Override the phases that the method needs; ``n`` is the number of patch tokens to keep.

    Rules for every reducer: only `Tokens` verbs change the number of tokens; no state between calls; images of a batch do
    not affect each other; no data-dependent shapes. A phase is called only if there is something to reduce
    (``n < len(tokens)``). Each reducing block returns ``n`` patch tokens, or all of them with ``keep_mask`` set (training).
    ``site`` gives the reducer's block and its current keep rate; it is set together with the schedule.
    """

    site: BlockContext
    straight_through: ClassVar[bool] = True  # True if gradients flow through its decisions in training
    # The inputs of its decisions. "keys": it works only in the phase ``between`` and reads only keys, values and the class
    # query of the `AttentionView`, and no features (it may merge them). "class": the same, and it only keeps and drops tokens.
    # The fast path may then run it before the features exist, and skip rows that are not read. "anywhere": no such promise
    reads: Reads = "anywhere"
    phases: ClassVar[frozenset[str]] = frozenset()  # the phases that the class overrides

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.phases = frozenset(m for m in PHASES if getattr(cls, m) is not getattr(Reducer, m))

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        """Group the patches at the patch embedding (at block 0 only); ``before`` then finds ``tokens.per_token["group"]``."""
        return patches

    def before(self, tokens: Tokens, n: int) -> Tokens:
        """Reduce at the input of the block (inter-block methods)."""
        return tokens

    def ahead(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        """Reduce at the input of the block, with a view of the attention that the block would compute on these tokens."""
        return tokens

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        """Reduce after the attention residual and before the MLP (intra-block methods)."""
        return tokens

    def after(self, tokens: Tokens, n: int) -> Tokens:
        """Reduce at the output of the block."""
        return tokens

    def watch(self, tokens: Tokens, seen: AttentionView) -> Tokens:
        """Read the attention of the block *before* this one, and store results in `Tokens.per_token` or ``per_image``."""
        return tokens

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        """Return extra training losses by name, from this block's output tokens; ``rate`` is the share of patches to keep."""
        return {}

    def active(self, before: int, n: int) -> bool:
        """Return True if there is anything to do for ``before`` input patch tokens and ``n`` to keep."""
        return n < before

    def overrides(self, phase: str) -> bool:
        """Return True if this reducer works in that phase."""
        return phase in self.phases


class Prune(Reducer):
    """A method as most papers define it: a score of the tokens, and a rule for the rest (``reads``: see `Reducer`)."""

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
    """The options of a method (for Python, the command line and saved models alike), and its static rules."""

    info: ClassVar[MethodInfo]
    accepts_keep: ClassVar[bool] = True  # True if it takes a keep rate
    removes_at_most_half: ClassVar[bool] = False  # True if it removes at most half of a block's tokens
    before_blocks: ClassVar[bool] = False  # True if it works before the first block only
    old_options: ClassVar[Mapping[str, str]] = {}  # names of options in version 0.1 -> current names
    official_model: ClassVar[Mapping[str, Any]] = {}  # differences of the authors' model from a plain DeiT, as timm arguments

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
    def is_adaptive(self) -> bool:
        """True if each image of a batch may keep its own number of tokens (the method then has the option ``execution``)."""
        return False

    @property
    def batch_multiple(self) -> int:
        """The number that batch sizes must be a multiple of: more than 1 if consecutive images belong together (a clip)."""
        return 1

    @property
    def reads_positions(self) -> bool:
        """True if the method needs the model's absolute position embeddings (`Tokens.positions`)."""
        return False

    def build(self, site: BlockContext) -> Reducer:
        """Build the reducer for one block."""
        raise NotImplementedError

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        """Return the number of patch tokens that a block keeps of its ``n``, given ``patches`` patches of the image.

        ``rates`` are the keep rates of the reducing blocks so far, this block's last. The default is EViT's count:
        ceil(rate * n), relative to the block's input.
        """
        return math.ceil(rates[-1] * n)

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        """Return the patch tokens each block keeps; for an adaptive method, the largest number it may keep."""
        return schedule.counts(depth, patches, self.num_kept)

    def targets(self, schedule: Schedule, depth: int, patches: int) -> dict[int, float]:
        """Return the share of the initial patches that each reducing block is to keep (the target of a ratio loss)."""
        return schedule.targets(depth, patches, self.num_kept)

    def context(self, site: BlockContext) -> BlockContext:
        """Return the context that the reducer of a block gets; a chain of methods gives each its own."""
        return site

    def trial(self, image: Tensor) -> Tensor:
        """Return the image on which a reduced model is verified; a method that reduces only some images changes it."""
        return image

    def may_rise(self) -> bool:
        """Return True if counts to keep may rise from block to block; a count above the block's input is then ignored."""
        return False

    def reducer_blocks(self, schedule: Schedule, depth: int) -> Sequence[int]:
        """Return the blocks that have a reducer: those of the schedule, and others where the method records something."""
        return schedule.at

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        """Return the patch tokens at the attention and at the MLP of a block that reduces ``before`` tokens to ``after``."""
        if self.info.phase == "between":
            return before, after
        return (before, before) if self.info.phase == "after" else (after, after)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        """Return the schedule for a keep rate; by default at a quarter, a half and three quarters of the depth."""
        if keep is None:
            removed = "r=8 (tokens removed in every block), or " if hasattr(self, "r") else ""
            raise ValueError(
                f"{self.info.name}: say how many tokens to keep: {removed}keep=0.7 (a rate for each reducing block), or "
                "schedule=Schedule.keep_counts({3: 138, 6: 97, 9: 68}) for explicit counts"
            )
        return Schedule.rates(keep, quarters(depth) if at is None else at)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        """Return the multiply-adds of one reduction ``before`` -> ``after`` as published, by kind (`laconic.analysis.macs`)."""
        return {}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Rename weights from the names of the method's authors to Laconic's (see `laconic.import_checkpoint`)."""
        return dict(weights)

    def loss_weights(self) -> Mapping[str, float]:
        """Return the weights of the method's losses besides cross-entropy; others use the recipe's ``loss.ratio``."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return name and options, as JSON."""
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
    trained: bool  # True if the method should be used only after training
    learns: bool = False  # True if it adds parameters
    count: Literal["constant", "variable"] = "constant"  # "variable": each image of a batch keeps its own number of tokens
    class_readout: bool = False  # True if only the class token carries the result (the method may then change it)
    score_detail: str = ""  # in words, if ``score`` does not say enough
    rest_detail: str = ""
    full_attention: bool = False  # True if it needs the whole matrix of attention weights
    clips: bool = False  # True if it compares the frames of clips, so that models for images refuse its default options


METHODS: dict[str, MethodInfo] = {}
COMPOSED: dict[str, type[Method]] = {}  # configs that consist of methods (`laconic.Chain`), by their name in saved files
M = TypeVar("M", bound=type[Method])


@dataclass(frozen=True)
class Unregistered(Method):
    """The method made of a `Reducer` that is passed to `laconic.reduce_`: every reducing block gets a copy of it.

    Keep rates are EViT's (`Method.num_kept`). Its multiply-adds are not known, and it cannot be saved.
    """

    reducer: Reducer

    def __post_init__(self) -> None:
        kinds = [phase for phase in PHASES[1:-1] if phase in self.reducer.phases]
        if not kinds:
            raise TypeError(f"{type(self.reducer).__name__} overrides none of {', '.join(PHASES[1:-1])}, so it reduces nothing")
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
    for old in OLD_FACTS.keys() & facts.keys():
        warnings.warn(f"method({old}=...) is now method({OLD_FACTS[old]}=...)", DeprecationWarning, stacklevel=2)
        facts[OLD_FACTS[old]] = facts.pop(old)

    def register(config: M) -> M:
        old = METHODS.get(name)
        if old is not None and (old.config.__module__, old.config.__name__) != (config.__module__, config.__name__):
            raise ValueError(f"a method called {name!r} exists already ({old.config.__module__}); give this one another name")
        config.info = METHODS[name] = MethodInfo(name=name, config=config, **facts)
        return config

    return register


def methods() -> dict[str, MethodInfo]:
    """Return the facts of all methods by name: title, paper, phase, score, need for training, and config class.

    Methods of other packages are included (see `laconic.core.plugins`).
    """
    discover()
    return dict(sorted(METHODS.items()))


def renamed_options(config: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their current names; old names of version 0.1 cause a warning."""
    for name in options:
        if name in config.old_options:
            new = config.old_options[name]
            warnings.warn(f"{config.info.name}: option {name} is now {new}", DeprecationWarning, stacklevel=4)
    return {config.old_options.get(name, name): value for name, value in options.items()}


def resolve(method: str | Method | Reducer, options: dict[str, Any]) -> Method:
    """Return the config of a method, given its name and options, a config, or a `Reducer` that is not registered.

    Raises:
        LookupError: an unknown method.
        TypeError: an unknown option, or not a method.
        ValueError: a wrong value of an option.
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
    if method not in METHODS and method not in COMPOSED:
        known = ", ".join(sorted(METHODS))
        raise LookupError(f"no method is called {method!r}.{nearest_names(method, list(METHODS))} There are: {known}")
    config = METHODS[method].config if method in METHODS else COMPOSED[method]
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
