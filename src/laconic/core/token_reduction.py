"""The module ``model.laconic`` of a reduced model: its reducers, its schedule and its options.

Of the forwards, it stores only the last complete one of each thread (see `laconic.core.history`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from laconic.core.adaptive import is_static
from laconic.core.backbone import HOSTS, ModelSpec, block_spec
from laconic.core.dense import FILLS
from laconic.core.history import History, Last
from laconic.core.links import BlockLink, ModelRef, reduction_in
from laconic.core.method import Method, Reducer
from laconic.core.patch_input import GROUP
from laconic.core.runtime import call_of
from laconic.core.schedule import Schedule
from laconic.core.stages import Stages
from laconic.core.text_table import by
from laconic.core.tokens import Tokens

log = logging.getLogger(__name__)
Compute = Literal["needed", "all"]


class TokenReduction(nn.Module):
    """The submodule ``model.laconic`` of a reduced model: reducers, schedule and execution options."""

    reduces_tokens: ClassVar[bool] = True  # lets `laconic.core.links.reduction_in` tell this module from a wrapper around it

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
        self.stages = Stages(config, schedule, host.shapes(model))
        self.config, self.host_path, self.depth = config, host.path, len(host.blocks(model))
        self.ref = ModelRef(model)  # the model owns this module, not the other way round
        last = self.stages.shapes[-1]
        self.prefix, self.has_cls, self.grid = last.prefix, last.has_cls, last.grid
        self.adaptive = config.is_adaptive  # True if every image keeps its own number of tokens
        padded = config.is_adaptive and config.execution == "padded"  # type: ignore[attr-defined]
        self.bucket: int = config.bucket if padded else 1  # type: ignore[attr-defined]
        self.compacts = config.is_adaptive and getattr(config, "compacts", True)
        self.starts = frozenset(self.stages.starts)
        self.reducers = nn.ModuleDict({str(block): config.build(site) for block, site in self.stages.sites().items()})
        self.set_schedule(schedule)
        reference = next(model.parameters())
        self.to(reference.device, reference.dtype)
        self.train(model.training)
        self.restore = restore  # True or a fill: restore features for every patch after the last block
        self.compute = compute  # as the user passed it
        self.skip_unused = False  # True once `laconic.core.verify` has verified that rows that are not read may be skipped
        self.known_readout = False  # True if the methods between the last block and the output are the library's own
        self.merges = True  # True if tokens may hold several patches after the last block
        self.in_tuples = False  # True if the model's blocks return a tuple
        self.old_settings: dict[int, Any] = {}  # settings of the model before it was reduced
        # wrapper of every phase of every reducer, called as around(own, tokens, *arguments); ``own`` is the reducer's method
        self.around: Callable[..., Tokens] | None = None
        self.forget()

    def forget(self) -> None:
        """Discard the last forwards."""
        self.__dict__["_last"], self.__dict__["_traced"], self.__dict__["_fresh"] = Last(), None, None

    # -------------------------------------------------------------------------------------------- learned parameters
    def note_untrained(self) -> None:
        """Record the state of the reducers' parameters, to warn if they are used before they are trained or loaded."""
        self.__dict__["_fresh"] = self._versions() if self.config.info.learns else None

    def warn_untrained(self) -> None:
        """Warn once that the method runs with parameters that were neither trained nor loaded."""
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
        self.stages = Stages(self.config, schedule, self.stages.shapes)
        for block, site in self.stages.sites().items():
            reducer: Any = self.reducers[str(block)]
            reducer.site = site

    @property
    def schedule(self) -> Schedule:
        """The schedule: the number of tokens each block keeps."""
        return self.stages.schedule

    def counts(self, patches: int | None = None) -> tuple[int, ...]:
        """Return the patch tokens each block keeps, for ``patches`` in the first stage (None: the model's own size)."""
        return self.stages.counts(patches)

    # -------------------------------------------------------------------------------------------- one forward
    def begin(self, host: Any, x: Tensor, stage: int, call: Any, previous: History | None) -> History:
        """Return the first history entry of a stage: the tokens that enter it.

        ``call`` is the `laconic.core.runtime.Call` with the grid of the image. Without a call (blocks that the user runs one by
        one) the grid is the model's own, or unknown (None) if the model accepts images of any size.

        Raises:
            ValueError: ``x`` does not consist of the prefix tokens and one token for every patch of the image.
        """
        shape, start, entry = self.stages.shapes[stage], self.stages.starts[stage], HOSTS[self.host_path]
        prefix, has_cls = entry.prefix(host) if len(self.stages.shapes) == 1 else (shape.prefix, shape.has_cls)
        patches = x.shape[1] - prefix
        single = len(self.stages.shapes) == 1
        grid = None if call is None else call.grid
        if not single:
            grid = shape.grid if shape.patches == patches else None
        elif call is None and not getattr(host, "dynamic_img_size", False):
            grid = entry.grid(host) if math.prod(entry.grid(host)) == patches else None
        if grid is not None and math.prod(grid) != patches:
            raise ValueError(
                f"{x.shape[1]} tokens enter the first block; expected {prefix} prefix tokens (num_prefix_tokens) and a grid of "
                f"{by(grid)} patches. Tokens of another kind (prompts, registers) must be counted as prefix tokens "
                "and come first, or they would be reduced as if they were patches"
            )
        positions = entry.positions(host) if self.config.reads_positions and len(self.stages.shapes) == 1 else None
        if positions is not None and len(positions) != patches:
            positions = None
        tokens = self._grouped(Tokens.start(x, prefix, has_cls, positions, grid), stage, call)
        fill = self.fill_of(entry) if self.restore else None
        if fill == "last":
            tokens = tokens.replace(dropped=torch.zeros_like(tokens.patches))
        if fill == "similar":
            tokens = tokens.replace(similar=tokens.token_of_patch)
        block = (
            start if previous is not None else start - 1
        )  # the input of a later stage's first block belongs to the stage before
        return History(self, tokens, block, self.stages.stage_counts(stage, patches), start, previous)

    def _grouped(self, tokens: Tokens, stage: int, call: Any) -> Tokens:
        """Return the tokens that enter the model, with the groups that its reducer made of them at the patch embedding."""
        first, patches = self.reducer(0), len(tokens)
        if stage or first is None or "embed" not in first.phases:
            return tokens
        if not first.active(patches, self.stages.stage_counts(0, patches)[0]):
            return tokens
        group = None if call is None else call.group
        if group is None or group.shape != tokens.size.shape:
            raise RuntimeError(
                f"{self.config.info.name} reduces the patches of an image before the first block, and the patch embedding did "
                "not run in this forward; call the model on images, not its blocks on features"
            )
        call.group = None
        return tokens.replace(per_token={GROUP: group})

    @property
    def embeds(self) -> bool:
        """True if a reducer works at the patch embedding, before the first block."""
        first = self.reducer(0)
        return first is not None and "embed" in first.phases

    def complete(self, history: History | None, tracing: bool = False) -> None:
        """Store the last forward of this thread (while a graph is traced: of the model)."""
        if tracing:
            self._traced = history
            return
        last: Last = self.__dict__["_last"]
        last.any, self.__dict__["_traced"] = history, None
        if self.training:
            last.training = history

    def remembered(self) -> tuple[History | None, History | None]:
        """Return the last forwards of this thread, in any mode and in training mode, for `remember`."""
        return self.__dict__["_last"].any, self.__dict__["_last"].training

    def remember(self, forwards: tuple[History | None, History | None]) -> None:
        """Set the last forwards of this thread."""
        self.__dict__["_last"].any, self.__dict__["_last"].training = forwards

    def last(self, *, training: bool = False) -> History | None:
        """Return the last complete forward of this thread (with ``training``, in training mode), or the running one."""
        call = call_of(self.ref)
        if call is not None and call.history is not None and not training:
            return call.history
        last: Last = self.__dict__["_last"]
        return self.__dict__["_traced"] or (last.training if training else None) or last.any

    def entry(self, index: int) -> Tokens:
        """Return the output tokens of block ``index - 1`` in the last forward of this thread, without their features.

        Raises:
            RuntimeError: there was no forward.
        """
        history = self.last()
        if history is None:
            raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
        return history.entry(index)

    @property
    def ledger(self) -> list[Tokens | None]:
        """The tokens of the last forward of this thread: those of the input, and those after each block."""
        history = self.last()
        return [None if history is None else history.entry(index) for index in range(self.depth + 1)]

    def reducer(self, index: int) -> Reducer | None:
        """Return the reducer of block ``index``, if it has one."""
        reducer: Any = self._modules["reducers"]._modules.get(str(index))  # type: ignore[union-attr]
        return reducer

    def watcher(self, index: int, history: History, count: int) -> Reducer | None:
        """Return the reducer of block ``index`` if it reads the attention of the previous block.

        ``count`` is the number of patch tokens at that block's input.
        """
        reducer = self.reducer(index)
        if reducer is None or index in self.starts or "watch" not in reducer.phases:
            return None
        return reducer if history.counts[index - history.start] < count else None

    def refuse_lost(self, history: History, tokens: Tokens) -> None:
        """Raise if re-entrant checkpointing recomputes a block whose tokens were recorded without gradients.

        Raises:
            RuntimeError: the method passes tensors other than the features from block to block.
        """
        if history.with_gradient or not torch.is_grad_enabled() or not tokens.x.requires_grad:
            return
        found = [reducer for reducer in self.reducers.children() if isinstance(reducer, Reducer)]
        learns = any(p.requires_grad for reducer in found for p in reducer.parameters())
        decides = tokens.keep_mask is not None and learns and any(reducer.straight_through for reducer in found)
        if decides or tokens.per_image or tokens.parked is not None:
            raise RuntimeError(
                f"the tensors that {self.config.info.name} passes from block to block along with the features have lost their "
                "gradient, since re-entrant gradient checkpointing cannot carry it; use use_reentrant=False "
                "(timm.layers.set_reentrant_ckpt(False))"
            )

    @property
    def execution(self) -> str | None:
        """The execution of an adaptive method: its option, or ``masked`` in static graphs; None for other methods."""
        if not self.adaptive:
            return None
        return "masked" if is_static() else self.config.execution  # type: ignore[attr-defined]

    @property
    def packed(self) -> bool:
        """True if hidden tokens are not run."""
        return self.adaptive and not self.training and self.execution == "packed"

    def fill_of(self, entry: ModelSpec) -> str:
        """Return the fill of dropped patches for a restored output."""
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
        """The model's current pooling, and True if it pools the prefix tokens too."""
        return self.entry_of_host.pooling(self.model)

    @property
    def passthrough(self) -> set[int]:
        """The blocks that always run their own forward unchanged."""
        links = [block.__dict__.get("_laconic") for block in self.entry_of_host.blocks(self.model)]
        return {link.index for link in links if isinstance(link, BlockLink) and link.passthrough}

    # -------------------------------------------------------------------------------------------- copies
    def __getstate__(self) -> dict[str, Any]:
        # a copy has not run yet: the stored forwards belong to the original
        return {name: value for name, value in self.__dict__.items() if name not in ("_last", "_traced", "_fresh")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.forget()


DEFAULT_FILL = "similar"  # it measures best on a dense task: benchmarks/restore_fill.py
assert DEFAULT_FILL in FILLS


def passes_through(reduction: TokenReduction, index: int, block: nn.Module) -> bool:
    """Return True if a block always runs unchanged: no reducer, no watching reducer at the next block, no need of positions."""
    starts = reduction.stages.starts[1:]
    ends = {*starts, *(start - 1 for start in starts), reduction.depth - 1}
    following = reduction.reducer(index + 1)
    watched = following is not None and index + 1 not in reduction.starts and "watch" in following.phases
    return index not in ends and not block_spec(block).needs_positions and reduction.reducer(index) is None and not watched


def find_reduction(model: nn.Module) -> TokenReduction | None:
    """Return the reduction of a reduced model (or of a reduced model inside it), or None."""
    for module in model.modules():
        if getattr(type(module), "laconic_base", None) is not None and "laconic" in module._modules:
            found: TokenReduction = reduction_in(module)
            return found
        if isinstance(module, TokenReduction):
            return module
    return None


def reduction_of(model: nn.Module) -> TokenReduction:
    """Return the reduction of a reduced model.

    Raises:
        ValueError: the model is not reduced.
    """
    reduction = find_reduction(model) if isinstance(model, nn.Module) else None
    if reduction is None:
        raise ValueError(f"this {type(model).__name__} is not reduced; call laconic.reduce_(model, method, keep=...) first")
    return reduction
