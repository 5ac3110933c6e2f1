"""One block of a reduced model: its two halves with a method before, between and after, on padded or on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laconic.attention import Seen, Watch
from laconic.grid import GridMap
from laconic.hosts import Halves, halves_of, path_of
from laconic.masking import bias_of
from laconic.packing import Packing
from laconic.reducer import Reducer
from laconic.rows import table_rows
from laconic.sparing import Spared, Sparing
from laconic.tokens import Tokens

Moment = Callable[..., Tokens]  # (reducer, name of the moment, tokens, arguments of the moment)


@dataclass(frozen=True)
class Step:
    """How one block is passed: with which reducer (if it has anything to do), and who watches its attention.

    ``n`` is the number of patch tokens to leave. ``packed``: tokens that nobody sees are not run. ``spared``: work that nobody
    needs is not done.
    """

    index: int
    block: Any
    reducer: Reducer | None
    watcher: Reducer | None
    n: int
    packed: bool
    spared: Spared | None
    moment: Moment

    def run(self, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """The block, with all moments of its reducer."""
        if self.spared in ("prefix", "dropped") and self.watcher is None:
            spared = self._sparing(tokens, kwargs)
            if spared is not None:
                return spared
        if self.reducer is None:
            return self._block(None, tokens, kwargs)
        tokens = self.moment(self.reducer, "before", tokens, self.n)
        if self.reducer.overrides("ahead"):
            tokens = self._ahead(self.reducer, tokens, kwargs)
        tokens = self._block(self.reducer if self.reducer.overrides("between") else None, tokens, kwargs)
        return self.moment(self.reducer, "after", tokens, self.n)

    def _sparing(self, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens | None:
        """The block without the rows that nobody needs, or None where it must be run whole."""
        halves = halves_of(self.block)
        bias, kwargs = _bias(halves, tokens), _placed(halves, tokens, None, kwargs)
        sparing = Sparing.of(self.block, halves, tokens, kwargs, bias)
        if sparing is None or (self.reducer is not None and sparing.parts is None):
            return None
        if self.spared == "prefix":
            return sparing.prefix_alone(tokens, partial(self._between, self.reducer))
        return (
            None if sparing.parts is None else sparing.choice_first(sparing.parts, tokens, partial(self._between, self.reducer))
        )

    def _ahead(self, reducer: Reducer, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """A look at the block's attention before the block: its first half is run once more, for its q, k and v."""
        halves = halves_of(self.block)
        calls: list[dict[str, Any]] = []
        with Watch(calls, _bias(halves, tokens), rows=_rows(halves, tokens)):
            half = halves.attention or type(self.block).forward
            half(self.block, tokens.x, **_placed(halves, tokens, None, kwargs))
        return self.moment(reducer, "ahead", tokens, Seen.of(calls, tokens, self.name, coarse=halves.grid is not None), self.n)

    def _block(self, between: Reducer | None, tokens: Tokens, kwargs: dict[str, Any]) -> Tokens:
        """In two halves with the method between them, or its class's own forward."""
        block, halves = self.block, halves_of(self.block)
        packing = Packing.of(tokens) if self.packs else None
        bias, rows = None if packing is not None else _bias(halves, tokens), _rows(halves, tokens)
        kwargs = _placed(halves, tokens, packing, kwargs)
        again = getattr(block, "gradient_checkpointing", False) and block.training  # seams checkpoints it, its class must not
        own = tokens.attention is not None or tokens.switches is not None or rows is not None or again
        if between is None and self.watcher is None and bias is None and packing is None and not own:
            return tokens.replace(x=first_of(type(block).forward(block, tokens.x, **kwargs)))
        if self.spared is not None and self.watcher is None and not self.packed and not own:
            sparing = Sparing.of(block, halves, tokens, kwargs, bias)
            if sparing is not None and sparing.parts is not None:
                return sparing.step_by_step(sparing.parts, tokens, partial(self._between, between))
        calls: list[dict[str, Any]] = []
        x = tokens.x if packing is None else packing.pack(tokens.x)
        parted = between is not None or tokens.switches is not None or halves.hidden or again
        with Watch(calls, bias, tokens.attention, rows) if packing is None else packing.watch(calls, rows):
            if parted and halves.attention is not None:
                x = x + switched(tokens, packing, "attention", partial(halves.attention, block, **kwargs), x)
            elif tokens.switches is not None:
                x = x + switched(tokens, packing, "whole", partial(type(block).forward, block, **kwargs), x)
            else:
                x = first_of(type(block).forward(block, x, **kwargs))
        if not calls and (bias is not None or rows is not None):
            Seen.of(calls, tokens, self.name)  # nobody has seen the bias: it says so
        tokens = tokens.replace(x=x if packing is None else packing.unpack(x, tokens.x), attention=None)
        if self.watcher is not None or between is not None:
            looked = calls if packing is None else packing.seen(calls)
            seen = Seen.of(looked, tokens, self.name, coarse=halves.grid is not None)
            if self.watcher is not None:
                tokens = self.moment(self.watcher, "watch", tokens, seen)
            if halves.mlp is not None:
                tokens = self._between(between, tokens, seen)
        if parted and halves.mlp is not None:
            tokens = tokens.replace(x=self._mlp(halves.mlp, tokens))
        return tokens.replace(switches=None)

    def _between(self, reducer: Reducer | None, tokens: Tokens, seen: Seen) -> Tokens:
        return tokens if reducer is None else self.moment(reducer, "between", tokens, seen, self.n)

    def _mlp(self, mlp: Callable[..., Tensor], tokens: Tokens) -> Tensor:
        packing, half = Packing.of(tokens) if self.packs else None, partial(mlp, self.block)
        if packing is None:
            return tokens.x + switched(tokens, None, "mlp", half, tokens.x)
        row = packing.pack(tokens.x)
        return packing.unpack(row + switched(tokens, packing, "mlp", half, row), tokens.x)

    @property
    def packs(self) -> bool:
        """Whether tokens that nobody sees may be left out: not where a bias for pairs, or a grid, is made for a batch."""
        halves = halves_of(self.block)
        return self.packed and not halves.relative and halves.grid is None

    @property
    def name(self) -> str:
        """The block, in words."""
        return f"block {self.index} ({path_of(type(self.block))})"


def refuse_lost(method: str, reducers: Iterable[nn.Module], tokens: Tokens) -> None:
    """Features that carry a gradient have met state without one: a block is run again, and what came with them is lost.

    Raises:
        RuntimeError: the method hands something from block to block beside the features.
    """
    found = [reducer for reducer in reducers if isinstance(reducer, Reducer)]
    learns = any(p.requires_grad for reducer in found for p in reducer.parameters())
    decides = tokens.alive is not None and learns and any(reducer.straight_through for reducer in found)
    if decides or tokens.notes or tokens.aside is not None:
        raise RuntimeError(
            f"what {method} hands from block to block beside the features has lost its gradient: re-entrant gradient "
            "checkpointing cannot carry it; use use_reentrant=False (timm.layers.set_reentrant_ckpt(False))"
        )


def refuse_others(index: int, x: Tensor, tokens: Tokens) -> None:
    """Features must be of the tokens that the block before has left.

    Raises:
        RuntimeError: they are of others.
    """
    if x.shape[:2] != tokens.shape:
        images, count = tokens.shape
        raise RuntimeError(
            f"block {index} got {tuple(x.shape)}, but the block before it left {images} images of {count} tokens; run the "
            "blocks of a reduced model in order, one forward at a time"
        )


def switched(tokens: Tokens, packing: Packing | None, part: str, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a part of the block adds to ``x``, as far as the switches let it (see `Switches`)."""
    switches = tokens.switches
    if switches is None:
        return half(x)
    added: Tensor = getattr(switches if packing is None else switches.packed(packing.index), part)(half, x)
    return added


def first_of(output: Any) -> Tensor:
    """The features that a block gives, alone or as the first of a tuple."""
    features: Tensor = output[0] if isinstance(output, tuple) else output
    return features


def _bias(halves: Halves, tokens: Tokens) -> Tensor | None:
    """What the tokens add to the attention: nothing where its keys are of the full grid, which shows them as it should."""
    return None if halves.grid is not None else bias_of(tokens)


def _rows(halves: Halves, tokens: Tokens) -> Tensor | None:
    """The tokens [B, N] of the full number that a bias made for all of them is to be read at."""
    if not halves.relative or tokens.patch is None:
        return None
    first = torch.arange(tokens.prefix, device=tokens.patch.device).expand(tokens.patch.shape[0], -1)
    return torch.cat([first, tokens.patch + tokens.prefix], 1)


def _placed(halves: Halves, tokens: Tokens, packing: Packing | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a block, with what says where the tokens are: rows of its rotary table, or a map of its grid."""
    if halves.grid is not None:
        moved = GridMap.of(tokens)
        return kwargs if moved is None else {**kwargs, halves.grid: moved}
    table = None if halves.rope is None else kwargs.get(halves.rope)
    if halves.rope is None or table is None or (packing is None and tokens.patch is None):
        return kwargs
    if isinstance(table, tuple):  # cosines and sines apart (transformers); in one table for as long as it takes
        cos, sin = table
        rows = _rotary(torch.cat([sin, cos], -1), tokens, packing)
        return {**kwargs, halves.rope: (rows[..., sin.shape[-1] :], rows[..., : sin.shape[-1]])}
    return {**kwargs, halves.rope: _rotary(table, tokens, packing)}


def _rotary(table: Tensor, tokens: Tokens, packing: Packing | None) -> Tensor:
    return table_rows(table, tokens.place) if packing is None else packing.rotary(table, tokens)
