"""What runs inside a reduced model: a method between the halves of a host's blocks, and the ledger of one forward.

The trick, said out loud: every block of the user's model gets a ``forward`` of its own that runs the same submodules in
two halves, and a reducer works on the tokens before, between or after them. Blocks with nothing to do run their class's
own forward. What has become of each patch is written into a ledger, one entry a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laconic.deciding import Deciding
from laconic.hosts import HOSTS, Host
from laconic.passing import Step
from laconic.pooling import pool_by_size
from laconic.reducer import Method, Reducer, Shape, sites_of
from laconic.schedule import Schedule
from laconic.tokens import Tokens


class Compression(nn.Module):
    """Lives on the reduced model as ``model.laconic``: its reducers, its schedule, and the ledger of the last forward.

    The ledger makes a reduced model unfit for two threads at once; copies of the model have ledgers of their own.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, host: Host, config: Method, schedule: Schedule) -> None:
        super().__init__()
        blocks = host.blocks(model)
        schedule.check_depth(len(blocks))
        self.config, self.host_path, self.depth = config, host.path, len(blocks)
        # the model owns this module, not the other way round: it must not become a child
        object.__setattr__(self, "model", model)
        self.prefix, self.has_cls = host.prefix(model)
        self.grid, self.pooling = host.grid(model), host.pooling(model)
        self.shape = Shape(self.depth, host.dim(model), host.heads(model), self.grid)
        sites = sites_of(config, schedule, self.shape)
        self.reducers = nn.ModuleDict({str(block): config.build(site) for block, site in sites.items()})
        self.schedule = schedule
        self.set_schedule(schedule)
        reference = next(model.parameters())
        self.to(reference.device, reference.dtype)
        self.train(model.training)
        self.ledger: list[Tokens | None] = [None] * (self.depth + 1)
        self._with_gradient = [False] * (self.depth + 1)  # was the entry written while gradients were recorded?
        self.observer: Callable[[Tokens, Tokens], None] | None = None  # sees the tokens before and after each moment

    # -------------------------------------------------------------------------------------------- schedule
    def set_schedule(self, schedule: Schedule) -> None:
        """Change the schedule between two steps (warm-in); the blocks must stay the same.

        Raises:
            ValueError: the new schedule reduces at other blocks.
        """
        if schedule.at != self.schedule.at:
            raise ValueError(f"schedule reduces at {list(schedule.at)}, but this model was built for {list(self.schedule.at)}")
        self.schedule = schedule
        for block, site in sites_of(self.config, schedule, self.shape).items():
            reducer: Any = self.reducers[str(block)]
            reducer.site = site

    def counts(self, patches: int) -> tuple[int, ...]:
        """Patch tokens each block leaves, for an image of that many patches."""
        return self.config.counts(self.schedule, self.depth, patches)

    def losses(self) -> dict[str, Tensor]:
        """The method's own losses of the last forward, each a mean over the reducing blocks."""
        last = self.entry(self.depth)
        targets = self.schedule.targets(self.depth, last.where.shape[1], self.config.leaves)
        parts = [
            reducer.losses(self.entry(b + 1), rate) for b, rate in targets.items() if (reducer := self.reducer(b)) is not None
        ]
        names = sorted({name for part in parts for name in part})
        return {name: torch.stack([part[name] for part in parts if name in part]).mean() for name in names}

    # -------------------------------------------------------------------------------------------- one block
    def run(self, index: int, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands in for the forward of block ``index``."""
        if args or kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("a reduced model takes no attention mask: a mask for all tokens does not fit those that are left")
        tokens = self._arriving(index, x)
        n = self.counts(tokens.where.shape[1])[index]
        reducer = self.reducer(index)
        if reducer is not None and not reducer.active(len(tokens), n):
            reducer = None
        packed = self.execution == "packed" and not self.training
        step = Step(index, block, reducer, self._watcher(index + 1, tokens), n, packed, self._moment)
        tokens = step.run(tokens, kwargs)
        if reducer is not None and len(tokens) != n and tokens.alive is None and self.execution is None:
            raise RuntimeError(f"{self.config.row.name} left {len(tokens)} patch tokens at block {index}; {n} were asked for")
        self._note(index + 1, tokens)
        return tokens.x

    def _note(self, index: int, tokens: Tokens) -> None:
        self._with_gradient[index] = torch.is_grad_enabled()
        # everything but the features: those would keep every activation alive
        self.ledger[index] = tokens.replace(x=tokens.x.new_empty(tokens.x.shape[0], 0, tokens.x.shape[2]))

    def _arriving(self, index: int, x: Tensor) -> Tokens:
        if index == 0:
            start = Tokens.start(x, self.prefix, self.has_cls, self._positions(x))
            self._note(0, start)
            return start
        tokens = self.entry(index)
        if self.training and torch.is_grad_enabled() and x.requires_grad and not self._with_gradient[index]:
            self._refuse_lost(tokens)
        if x.shape[:2] != (tokens.size.shape[0], self.prefix + len(tokens)):
            raise RuntimeError(
                f"block {index} got {tuple(x.shape)}, but the block before it left {tokens.size.shape[0]} images of "
                f"{self.prefix + len(tokens)} tokens; run the blocks of a reduced model in order, one forward at a time"
            )
        return tokens.replace(x=x)

    def entry(self, index: int) -> Tokens:
        """The tokens that came out of block ``index - 1`` in the last forward, without their features."""
        tokens = self.ledger[index]
        if tokens is None:
            raise RuntimeError("this reduced model has not run forward yet; run it on a batch of images first")
        return tokens

    def _refuse_lost(self, tokens: Tokens) -> None:
        """Features that carry a gradient have met state without one: a block is run again, and what came with them is lost."""
        through = any(isinstance(reducer, Reducer) and reducer.straight_through for reducer in self.reducers.children())
        decides = tokens.alive is not None and through and any(p.requires_grad for p in self.reducers.parameters())
        if decides or tokens.notes or tokens.aside is not None:
            raise RuntimeError(
                f"what {self.config.row.name} hands from block to block beside the features has lost its gradient: re-entrant "
                "gradient checkpointing cannot carry it; use use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
            )

    def reducer(self, index: int) -> Reducer | None:
        """The reducer of block ``index``, if it has one."""
        reducer = self.reducers[str(index)] if str(index) in self.reducers else None  # noqa: SIM401 (ModuleDict has no get)
        return reducer if isinstance(reducer, Reducer) else None

    def _watcher(self, index: int, tokens: Tokens) -> Reducer | None:
        reducer = self.reducer(index)
        wanted = reducer is not None and reducer.overrides("watch")
        return reducer if wanted and self.counts(tokens.where.shape[1])[index] < len(tokens) else None

    def _positions(self, x: Tensor) -> Tensor | None:
        table = HOSTS[self.host_path].positions(self.model)
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

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Stands in for the pooling of the host: its own, with every token counted as often as it has patches."""
        host: Any = self.model
        kind, prefix_too = self.pooling
        tokens = self.ledger[self.depth]
        if tokens is None or not tokens.merged or x.shape[1] != self.prefix + len(tokens):
            return type(host).pool(host, x, pool_type)
        return pool_by_size(partial(type(host).pool, host), x, tokens, pool_type or kind, prefix_too)

    # -------------------------------------------------------------------------------------------- copies
    def __getstate__(self) -> dict[str, Any]:
        # a copy starts with an empty ledger: what is in it belongs to the forward (and the graph) of the original
        return {**self.__dict__, "ledger": [None] * (self.depth + 1)}


def attach(host: Any, entry: Host, compression: Compression) -> None:
    """Put a compression between the halves of the host's blocks."""
    for index, block in enumerate(entry.blocks(host)):
        block.forward = partial(compression.run, index, block)
    host.pool = compression.pool
    host.laconic = compression


def detach(host: Any, entry: Host) -> None:
    """Undo `attach`."""
    for block in entry.blocks(host):
        block.__dict__.pop("forward", None)
    host.__dict__.pop("pool", None)
    del host.laconic


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
