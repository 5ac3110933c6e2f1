"""The module ``model.laconic`` of a reduced model: its reducers, its schedule and its options.

Nothing of a forward is kept here but, for each thread, the last one that was complete (see `laconic.core.history`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveMethod
from laconic.core.backbone import HOSTS, ModelSpec, block_spec
from laconic.core.dense import FILLS
from laconic.core.history import History, Last
from laconic.core.links import BlockLink, ModelRef, reduction_in
from laconic.core.method import Method, Reducer
from laconic.core.runtime import call_of
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.tokens import Tokens

log = logging.getLogger(__name__)
Compute = Literal["needed", "all"]


class TokenReduction(nn.Module):
    """Lives on the reduced model as ``model.laconic``: its reducers, its schedule, and how it is run."""

    reduces_tokens: ClassVar[bool] = True  # for `laconic.core.runtime.reduction_in`, which must know it from a wrapper

    def __init__(
        self,
        model: nn.Module,
        host: ModelSpec,
        config: Method,
        schedule: Schedule,
        restore: bool | str | None = None,
        compute: Compute | None = None,
    ) -> None:
        super().__init__()
        self.staging = Stages(config, schedule, host.shapes(model))
        self.config, self.host_path, self.depth = config, host.path, len(host.blocks(model))
        self.ref = ModelRef(model)  # the model owns this module, not the other way round
        last = self.staging.shapes[-1]
        self.prefix, self.has_cls, self.grid = last.prefix, last.has_cls, last.grid
        self.adaptive = isinstance(config, AdaptiveMethod)  # True if every image keeps a number of tokens of its own
        self.compacts = isinstance(config, AdaptiveMethod) and config.compacts
        self.starts = frozenset(self.staging.starts)
        self.reducers = nn.ModuleDict({str(block): config.build(site) for block, site in self.staging.sites().items()})
        self.set_schedule(schedule)
        reference = next(model.parameters())
        self.to(reference.device, reference.dtype)
        self.train(model.training)
        self.restore = restore  # True or a fill: give every patch features again after the last block
        self.compute = compute  # as asked for
        self.skip_unused = False  # True once `laconic.core.verify` has proved that rows that are not read may be left out
        self.known_readout = False  # True if the methods between the last block and the answer are the library's own
        self.merges = True  # True if tokens may stand for several patches after the last block
        self.in_tuples = False  # True if the model's blocks return a tuple
        self.settled: dict[int, Any] = {}  # settings of the model before it was reduced
        # called as around(own, tokens, *arguments) wherever a reducer works; ``own`` of the rest is what it would do
        self.around: Callable[..., Tokens] | None = None
        self.forget()

    def forget(self) -> None:
        """Let go of the last forwards."""
        self.__dict__["_last"], self.__dict__["_traced"], self.__dict__["_fresh"] = Last(), None, None

    # -------------------------------------------------------------------------------------------- learned parameters
    def note_untrained(self) -> None:
        """Remember what the reducers' parameters are now, so that a use before they are trained or loaded is said."""
        self.__dict__["_fresh"] = self._versions() if self.config.info.learns else None

    def warn_untrained(self) -> None:
        """Say once that the method runs with parameters that were neither trained nor loaded."""
        fresh, self.__dict__["_fresh"] = self.__dict__["_fresh"], None
        if fresh and fresh == self._versions():
            log.warning(
                "%s adds parameters to the model, and they were neither trained nor loaded. Train them (laconic train), or "
                "load weights (laconic.load, laconic.import_checkpoint, load_state_dict)",
                self.config.info.name,
            )

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.parameters()]

    # -------------------------------------------------------------------------------------------- schedule
    def set_schedule(self, schedule: Schedule) -> None:
        """Change the schedule between two steps (warm-in); the blocks must stay the same.

        Raises:
            ValueError: the new schedule reduces at other blocks.
        """
        if schedule.at != self.schedule.at:
            raise ValueError(f"schedule reduces at {list(schedule.at)}, but this model was built for {list(self.schedule.at)}")
        self.staging = Stages(self.config, schedule, self.staging.shapes)
        for block, site in self.staging.sites().items():
            reducer: Any = self.reducers[str(block)]
            reducer.site = site

    @property
    def schedule(self) -> Schedule:
        """How many tokens each block leaves."""
        return self.staging.schedule

    def counts(self, patches: int | None = None) -> tuple[int, ...]:
        """Patch tokens each block leaves, for an image of that many patches (in the first stage) or of the host's own size."""
        return self.staging.counts(patches)

    # -------------------------------------------------------------------------------------------- one forward
    def begin(self, host: Any, x: Tensor, stage: int, call: Any, previous: History | None) -> History:
        """Return the tokens that enter a stage of the model.

        ``call`` is the `laconic.core.runtime.Call` that knows the grid of the image. Without one (blocks that are run by hand) it is
        the model's own, unless the model takes images of any size; None where it is not known.

        Raises:
            ValueError: they are not the prefix tokens and one for every patch of the image.
        """
        shape, start, entry = self.staging.shapes[stage], self.staging.starts[stage], HOSTS[self.host_path]
        prefix, has_cls = entry.prefix(host) if len(self.staging.shapes) == 1 else (shape.prefix, shape.has_cls)
        patches = x.shape[1] - prefix
        single = len(self.staging.shapes) == 1
        grid = None if call is None else call.grid
        if not single:
            grid = shape.grid if shape.patches == patches else None
        elif call is None and not getattr(host, "dynamic_img_size", False):
            grid = entry.grid(host) if math.prod(entry.grid(host)) == patches else None
        if grid is not None and grid[0] * grid[1] != patches:
            raise ValueError(
                f"{x.shape[1]} tokens enter the first block; expected {prefix} prefix tokens (num_prefix_tokens) and a grid of "
                f"{grid[0]} x {grid[1]} patches. Tokens of another kind (prompts, registers) must be counted as prefix tokens "
                "and stand first, or they would be reduced as if they were patches"
            )
        positions = entry.positions(host) if self.config.reads_positions and len(self.staging.shapes) == 1 else None
        if positions is not None and len(positions) != patches:
            positions = None
        tokens = Tokens.start(x, prefix, has_cls, positions, grid)
        fill = self.fill_of(entry) if self.restore else None
        if fill == "last":
            tokens = tokens.replace(dropped=torch.zeros_like(tokens.patches))
        if fill == "similar":
            tokens = tokens.replace(similar=tokens.token_of_patch)
        block = start if previous is not None else start - 1  # a later stage: what its first block got is of the stage before
        return History(self, tokens, block, self.staging.stage_counts(stage, patches), start, previous)

    def complete(self, history: History | None, tracing: bool = False) -> None:
        """Remember the last forward of this thread (while a graph is traced: of the model)."""
        if tracing:
            self._traced = history
            return
        last: Last = self.__dict__["_last"]
        last.any, self.__dict__["_traced"] = history, None
        if self.training:
            last.training = history

    def remembered(self) -> tuple[History | None, History | None]:
        """Return the last forwards of this thread, of any kind and in training mode, for `remember`."""
        return self.__dict__["_last"].any, self.__dict__["_last"].training

    def remember(self, forwards: tuple[History | None, History | None]) -> None:
        """Let these be the last forwards of this thread."""
        self.__dict__["_last"].any, self.__dict__["_last"].training = forwards

    def last(self, *, training: bool = False) -> History | None:
        """The last complete forward of this thread (in training mode), or the one that is running."""
        call = call_of(self.ref)
        if call is not None and call.history is not None and not training:
            return call.history
        last: Last = self.__dict__["_last"]
        return self.__dict__["_traced"] or (last.training if training else None) or last.any

    def entry(self, index: int) -> Tokens:
        """The tokens that came out of block ``index - 1`` in the last forward of this thread, without their features.

        Raises:
            RuntimeError: there was none.
        """
        history = self.last()
        if history is None:
            raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
        return history.entry(index)

    @property
    def ledger(self) -> list[Tokens | None]:
        """The tokens of the last forward of this thread: as they entered, and as each block left them."""
        history = self.last()
        return [None if history is None else history.entry(index) for index in range(self.depth + 1)]

    def reducer(self, index: int) -> Reducer | None:
        """The reducer of block ``index``, if it has one."""
        reducer: Any = self._modules["reducers"]._modules.get(str(index))  # type: ignore[union-attr]
        return reducer

    def watcher(self, index: int, history: History, count: int) -> Reducer | None:
        """The reducer of block ``index``, if it looks at the attention of the block before, which leaves ``count`` patches."""
        reducer = self.reducer(index)
        if reducer is None or index in self.starts or "watch" not in reducer.phases:
            return None
        return reducer if history.counts[index - history.start] < count else None

    def refuse_lost(self, history: History, tokens: Tokens) -> None:
        """Features that carry a gradient meet tokens that were noted without: a block is run again by re-entrant checkpointing.

        Raises:
            RuntimeError: the method hands something from block to block beside the features.
        """
        if history.with_gradient or not torch.is_grad_enabled() or not tokens.x.requires_grad:
            return
        found = [reducer for reducer in self.reducers.children() if isinstance(reducer, Reducer)]
        learns = any(p.requires_grad for reducer in found for p in reducer.parameters())
        decides = tokens.keep_mask is not None and learns and any(reducer.straight_through for reducer in found)
        if decides or tokens.per_image or tokens.parked is not None:
            raise RuntimeError(
                f"what {self.config.info.name} hands from block to block beside the features has lost its gradient: re-entrant "
                "gradient checkpointing cannot carry it; use use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
            )

    @property
    def execution(self) -> str | None:
        """How a method runs that decides on the number of tokens: as it was asked for, in static graphs ``masked``."""
        if not self.adaptive:
            return None
        static = torch.compiler.is_compiling() or torch._C._is_tracing()
        return "masked" if static else self.config.execution  # type: ignore[attr-defined]

    @property
    def packed(self) -> bool:
        """True if tokens that are hidden are not run."""
        return self.adaptive and not self.training and self.execution == "packed"

    def fill_of(self, entry: ModelSpec) -> str:
        """The fill of dropped patches, where they are given back."""
        if isinstance(self.restore, str):
            return self.restore
        return "mean" if entry.restores_output else DEFAULT_FILL

    @property
    def entry_of_host(self) -> ModelSpec:
        """The table entry of the model."""
        return HOSTS[self.host_path]

    @property
    def model(self) -> nn.Module:
        """The reduced model itself."""
        host: nn.Module = self.ref()
        return host

    @property
    def pooling(self) -> tuple[str, bool]:
        """Return how the model reads its last tokens now, and if the prefix tokens are pooled too."""
        return self.entry_of_host.pooling(self.model)

    @property
    def passed(self) -> set[int]:
        """The blocks that never have anything to do."""
        links = [block.__dict__.get("_laconic") for block in self.entry_of_host.blocks(self.model)]
        return {link.index for link in links if isinstance(link, BlockLink) and link.passthrough}

    # -------------------------------------------------------------------------------------------- copies
    def __getstate__(self) -> dict[str, Any]:
        # a copy has not run yet: what is remembered belongs to the forwards of the original
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_traced", "_fresh")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.forget()


DEFAULT_FILL = "similar"  # it measures best on a dense task: benchmarks/restore_fill.py
assert DEFAULT_FILL in FILLS


def passes_through(reduction: TokenReduction, index: int, block: nn.Module) -> bool:
    """True if a block never has anything to do: no reducer here, none that looks at it, and nothing to be told of tokens."""
    starts = reduction.staging.starts[1:]
    ends = {*starts, *(start - 1 for start in starts), reduction.depth - 1}
    following = reduction.reducer(index + 1)
    watched = following is not None and index + 1 not in reduction.starts and "watch" in following.phases
    return index not in ends and not block_spec(block).needs_positions and reduction.reducer(index) is None and not watched


def find_reduction(model: nn.Module) -> TokenReduction | None:
    """The reduction of a reduced model (or of the model inside of it), or None."""
    for module in model.modules():
        if getattr(type(module), "laconic_base", None) is not None and "laconic" in module._modules:
            found: TokenReduction = reduction_in(module)
            return found
        if isinstance(module, TokenReduction):
            return module
    return None


def reduction_of(model: nn.Module) -> TokenReduction:
    """The reduction of a reduced model.

    Raises:
        ValueError: the model is not reduced.
    """
    reduction = find_reduction(model) if isinstance(model, nn.Module) else None
    if reduction is None:
        raise ValueError(f"this {type(model).__name__} is not reduced; call laconic.reduce_(model, method, keep=...) first")
    return reduction
