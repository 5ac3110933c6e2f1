"""What runs inside a reduced model: a method between the halves of a host's blocks, and the ledger of one forward.

The trick, said out loud: every block of the user's model gets a ``forward`` of its own that runs the same submodules in
two halves, and a reducer works on the tokens before, between or after them. Blocks with nothing to do run their class's
own forward. What has become of each patch is written into a ledger, one entry a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laconic.calling import by_name
from laconic.deciding import Deciding
from laconic.grid import GridMap
from laconic.hosts import HOSTS, Host, halves_of
from laconic.passing import Step, refuse_lost, refuse_others
from laconic.reducer import Method, Reducer
from laconic.schedule import Schedule
from laconic.sparing import Spared, heard
from laconic.staging import Staging
from laconic.tokens import Tokens

Rows = Literal["needed", "all"]


class Compression(nn.Module):
    """Lives on the reduced model as ``model.laconic``: its reducers, its schedule, and the ledger of the last forward.

    The ledger makes a reduced model unfit for two threads at once; copies of the model have ledgers of their own.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        host: Host,
        config: Method,
        schedule: Schedule,
        restore: bool | None = None,
        rows: Rows | None = None,
    ) -> None:
        super().__init__()
        self.staging = Staging(config, schedule, host.shapes(model))
        self.config, self.host_path, self.depth = config, host.path, len(host.blocks(model))
        # the model owns this module, not the other way round: it must not become a child
        object.__setattr__(self, "model", model)
        last = self.staging.shapes[-1]
        self.prefix, self.has_cls, self.grid, self.pooling = last.prefix, last.has_cls, last.grid, host.pooling(model)
        self.reducers = nn.ModuleDict({str(block): config.build(site) for block, site in self.staging.sites().items()})
        self.set_schedule(schedule)
        starts = self.staging.starts[1:]
        ends = {*starts, *(start - 1 for start in starts), self.depth - 1}
        plain = [i for i, block in enumerate(host.blocks(model)) if not halves_of(block).placed]
        self.passed = {i for i in plain if i not in ends and self.reducer(i) is None and not self._watches(i + 1)}
        reference = next(model.parameters())
        self.to(reference.device, reference.dtype)
        self.train(model.training)
        self.ledger: list[Tokens | None] = [None] * (self.depth + 1)
        self._with_gradient = [False] * (self.depth + 1)  # was the entry written while gradients were recorded?
        self.restore = bool(restore)  # is every patch to have a token again after the last block?
        self.rows = rows  # as asked for
        self.spares = False  # are rows left out that nobody needs? `verify` says so
        self.answering = False  # is the host's own forward running, and not one that gives its features?
        self.in_tuples = False  # do the host's blocks give their output as the first of a tuple?
        self.settled: dict[int, Any] = {}  # what of the host was set for as long as it is reduced, and what it was before
        self.hooks: list[RemovableHandle] = []  # what comes before and after the host's forward
        self.observer: Callable[[Tokens, Tokens], None] | None = None  # sees the tokens before and after each moment

    # -------------------------------------------------------------------------------------------- schedule
    def set_schedule(self, schedule: Schedule) -> None:
        """Change the schedule between two steps (warm-in); the blocks must stay the same.

        Raises:
            ValueError: the new schedule reduces at other blocks.
        """
        if schedule.at != self.schedule.at:
            raise ValueError(f"schedule reduces at {list(schedule.at)}, but this model was built for {list(self.schedule.at)}")
        self.staging = Staging(self.config, schedule, self.staging.shapes)
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

    # -------------------------------------------------------------------------------------------- one block
    def run(self, index: int, block: nn.Module, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of block ``index``, whose parameters have these names."""
        if index in self.passed and self._passes(index, args, kwargs):
            return type(block).forward(block, *args, **kwargs)
        x, kwargs = by_name(names, args, kwargs, halves_of(block).own_mask)
        tokens = self._arriving(index, x)
        n = self._leaves(index, tokens)
        reducer = self.reducer(index)
        if reducer is not None and not reducer.active(len(tokens), n):
            reducer = None
        packed = self.execution == "packed" and not self.training
        spared = self._spared(index, block, reducer)
        step = Step(index, block, reducer, self._watcher(index + 1, tokens), n, packed, spared, self._moment)
        tokens = step.run(tokens, kwargs)
        if reducer is not None and len(tokens) != n and tokens.alive is None and self.execution is None:
            raise RuntimeError(f"{self.config.row.name} left {len(tokens)} patch tokens at block {index}; {n} were asked for")
        self._note(index + 1, tokens)
        x = self._handed_on(index, tokens)
        return (x,) if self.in_tuples else x

    def _passes(self, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a block that never has anything to do may run as it stands; if so, the books are kept already.

        Next to the products of a block, what is done besides runs in cold caches: a small image pays a hundredth for it.
        """
        if self.training or len(args) != 1:
            return False
        if index == 0:
            self._arriving(0, args[0])
        tokens = self.ledger[index]
        if tokens is None or not tokens.ordinary:
            return False
        if args[0].shape[:2] != tokens.shape or not all(value is None or value is False for value in kwargs.values()):
            return False
        self.ledger[index + 1], self._with_gradient[index + 1] = tokens, torch.is_grad_enabled()
        return True

    def _spared(self, index: int, block: nn.Module, reducer: Reducer | None) -> Spared | None:
        """What of a block nobody needs: nothing in training; where somebody listens to the block, no rows are left out."""
        if not self.spares or self.training:
            return None
        looks = "keys" if reducer is None else "anywhere" if self.execution is not None else reducer.looks
        last = self.answering and not self.restore and index + 1 == self.depth and looks != "anywhere"
        if last and not heard(block) and not heard(getattr(self.model, "norm", None)):
            return "prefix"
        return "dropped" if looks == "class" and not heard(block) else "listening"

    def _leaves(self, index: int, tokens: Tokens) -> int:
        """Patch tokens that a block is to leave of these."""
        stage = self.staging.stage(index)
        return self.staging.stage_counts(stage, tokens.where.shape[1])[index - self.staging.starts[stage]]

    def _handed_on(self, index: int, tokens: Tokens) -> Tensor:
        """What comes out of a block: its tokens; after the last block of a stage (of all, if asked for) the full grid."""
        full = GridMap.of(tokens) if index + 1 in self.staging.starts or (index + 1 == self.depth and self.restore) else None
        return tokens.x if full is None else torch.cat([tokens.x[:, : tokens.prefix], full.fill(tokens.patches)], 1)

    def _note(self, index: int, tokens: Tokens) -> None:
        self._with_gradient[index] = torch.is_grad_enabled()
        # everything but the features: those would keep every activation alive
        before, none = self.ledger[index - 1] if index else None, (tokens.x.shape[0], 0, tokens.x.shape[2])
        empty = before.x if before is not None and before.x.shape == none else tokens.x.new_empty(none)
        self.ledger[index] = tokens.replace(x=empty)

    def _arriving(self, index: int, x: Tensor) -> Tokens:
        if index in self.staging.starts:
            shape = self.staging.shapes[self.staging.stage(index)]
            start = Tokens.start(x, shape.prefix, shape.has_cls, self._positions(x))
            if index == 0:
                self._note(0, start)
            return start
        tokens = self.entry(index)
        if self.training and torch.is_grad_enabled() and x.requires_grad and not self._with_gradient[index]:
            refuse_lost(self.config.row.name, self.reducers.children(), tokens)
        refuse_others(index, x, tokens)
        return tokens.replace(x=x)

    def entry(self, index: int) -> Tokens:
        """The tokens that came out of block ``index - 1`` in the last forward, without their features."""
        tokens = self.ledger[index]
        if tokens is None:
            raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
        return tokens

    def reducer(self, index: int) -> Reducer | None:
        """The reducer of block ``index``, if it has one."""
        reducer = self.reducers[str(index)] if str(index) in self.reducers else None  # noqa: SIM401 (ModuleDict has no get)
        return reducer if isinstance(reducer, Reducer) else None

    def _watcher(self, index: int, tokens: Tokens) -> Reducer | None:
        return self.reducer(index) if self._watches(index) and self._leaves(index, tokens) < len(tokens) else None

    def _watches(self, index: int) -> bool:
        reducer = self.reducer(index)
        return reducer is not None and index not in self.staging.starts and reducer.overrides("watch")

    def _positions(self, x: Tensor) -> Tensor | None:
        table = HOSTS[self.host_path].positions(self.model) if len(self.staging.shapes) == 1 else None
        return table if table is not None and len(table) == x.shape[1] - self.prefix else None

    def _moment(self, reducer: Reducer, moment: str, tokens: Tokens, *arguments: Any) -> Tokens:
        if not reducer.overrides(moment):
            return tokens
        kind = tokens.x.device.type
        if torch.is_autocast_enabled(kind):  # similarities, exponentials and sums of scores stay in float32
            with torch.autocast(kind, enabled=False):
                out = getattr(reducer, moment)(tokens, *arguments)
        else:
            out = getattr(reducer, moment)(tokens, *arguments)
        if self.observer is not None:
            self.observer(tokens, out)
        compacts = isinstance(self.config, Deciding) and self.config.compacts
        return out.compact() if compacts and self.execution in ("packed", "padded") and not self.training else out

    @property
    def execution(self) -> str | None:
        """How a method runs that decides on the number of tokens: as it was asked for, in static graphs ``masked``."""
        if not isinstance(self.config, Deciding):
            return None
        return "masked" if torch.compiler.is_compiling() else self.config.execution

    # -------------------------------------------------------------------------------------------- copies
    def __getstate__(self) -> dict[str, Any]:
        # a copy starts with an empty ledger: what is in it belongs to the forward (and the graph) of the original
        return {**self.__dict__, "ledger": [None] * (self.depth + 1)}


def find_compression(model: nn.Module) -> Compression | None:
    """The compression of a reduced model, or None."""
    return next((m for m in model.modules() if isinstance(m, Compression)), None)


def compression_of(model: nn.Module) -> Compression:
    """The compression of a reduced model.

    Raises:
        ValueError: the model is not reduced.
    """
    compression = find_compression(model) if isinstance(model, nn.Module) else None
    if compression is None:
        raise ValueError(f"this {type(model).__name__} is not reduced; call laconic.reduce_(model, method, keep=...) first")
    return compression
