"""One block of a reduced model: its two halves with a method before, between and after, on padded or on packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from laconic.attention import Seen, Watch, bias_of
from laconic.hosts import Halves, halves_of, path_of
from laconic.packing import Packing
from laconic.reducer import Reducer
from laconic.tokens import Tokens

Moment = Callable[..., Tokens]  # (reducer, name of the moment, tokens, arguments of the moment)


@dataclass(frozen=True)
class Step:
    """How one block is passed: with which reducer (if it has anything to do), and who watches its attention.

    ``n`` is the number of patch tokens to leave. ``packed``: tokens that nobody sees are not run.
    """

    index: int
    block: Any
    reducer: Reducer | None
    watcher: Reducer | None
    n: int
    packed: bool
    moment: Moment

    def run(self, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """The block, with all moments of its reducer."""
        if self.reducer is None:
            return self._block(None, tokens, kwargs)
        tokens = self.moment(self.reducer, "before", tokens, self.n)
        if self.reducer.overrides("ahead"):
            tokens = self._ahead(self.reducer, tokens, kwargs)
        tokens = self._block(self.reducer if self.reducer.overrides("between") else None, tokens, kwargs)
        return self.moment(self.reducer, "after", tokens, self.n)

    def _ahead(self, reducer: Reducer, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """A look at the block's attention before the block: its first half is run once more, for its q, k and v."""
        halves = halves_of(self.block)
        calls: list[dict[str, Any]] = []
        with Watch(calls, bias_of(tokens)):
            half = halves.attention or type(self.block).forward
            half(self.block, tokens.x, **_rotated(halves, tokens, None, kwargs))
        return self.moment(reducer, "ahead", tokens, Seen.of(calls, tokens, self.name), self.n)

    def _block(self, between: Reducer | None, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """In two halves with the method between them, or its class's own forward."""
        block, halves = self.block, halves_of(self.block)
        packing = Packing.of(tokens) if self.packed else None
        bias = None if packing is not None else bias_of(tokens)
        kwargs = _rotated(halves, tokens, packing, kwargs)
        own = tokens.attention is not None or tokens.switches is not None
        if between is None and self.watcher is None and bias is None and packing is None and not own:
            return tokens.replace(x=type(block).forward(block, tokens.x, **kwargs))
        calls: list[dict[str, Any]] = []
        x = tokens.x if packing is None else packing.pack(tokens.x)
        parted = between is not None or tokens.switches is not None
        with Watch(calls, bias, tokens.attention) if packing is None else packing.watch(calls):
            if parted and halves.attention is not None:
                x = x + switched(tokens, packing, "attention", partial(halves.attention, block, **kwargs), x)
            elif tokens.switches is not None:
                x = x + switched(tokens, packing, "whole", partial(type(block).forward, block, **kwargs), x)
            else:
                x = type(block).forward(block, x, **kwargs)
        tokens = tokens.replace(x=x if packing is None else packing.unpack(x, tokens.x), attention=None)
        if self.watcher is not None or between is not None:
            seen = Seen.of(calls if packing is None else packing.seen(calls), tokens, self.name)
            if self.watcher is not None:
                tokens = self.moment(self.watcher, "watch", tokens, seen)
            if between is not None and halves.mlp is not None:
                tokens = self.moment(between, "between", tokens, seen, self.n)
        if parted and halves.mlp is not None:
            tokens = tokens.replace(x=self._mlp(halves.mlp, tokens))
        return tokens.replace(switches=None)

    def _mlp(self, mlp: Callable[..., Tensor], tokens: Tokens) -> Tensor:
        packing, half = Packing.of(tokens) if self.packed else None, partial(mlp, self.block)
        if packing is None:
            return tokens.x + switched(tokens, None, "mlp", half, tokens.x)
        row = packing.pack(tokens.x)
        return packing.unpack(row + switched(tokens, packing, "mlp", half, row), tokens.x)

    @property
    def name(self) -> str:
        """The block, in words."""
        return f"block {self.index} ({path_of(type(self.block))})"


def switched(tokens: Tokens, packing: Packing | None, part: str, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a part of the block adds to ``x``, as far as the switches let it (see `Switches`)."""
    switches = tokens.switches
    if switches is None:
        return half(x)
    added: Tensor = getattr(switches if packing is None else switches.packed(packing.index), part)(half, x)
    return added


def _rotated(halves: Halves, tokens: Tokens, packing: Packing | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a block, with the rows of its rotary table that belong to the tokens there are."""
    table = None if halves.rope is None else kwargs.get(halves.rope)
    if halves.rope is None or table is None or (packing is None and tokens.patch is None):
        return kwargs
    rows = _rows_of_table(table, tokens.place) if packing is None else packing.rotary(table, tokens)
    return {**kwargs, halves.rope: rows}


def _rows_of_table(table: Tensor, patch: Tensor) -> Tensor:
    """Rotary table [P, D] or [H, P, D], shared by all images, as [B, 1 or H, L, D] for the patches in ``patch``."""
    if table.dim() == 2:
        return table[patch].unsqueeze(1)
    return table[:, patch].transpose(0, 1)
