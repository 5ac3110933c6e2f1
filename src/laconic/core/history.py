"""The state of one forward, stored with its features and not on the model.

Each entry holds the tokens after one block (without their features) and a reference to the previous entry; the chain of
entries describes the forward. The newest entry is attached to the storage of the current features, so any code that continues
with those features finds it: the next block, a checkpointed block that is recomputed (in any thread), a head that runs later,
a hook. The entry survives views and `detach`, is not copied or saved with a tensor, and is freed with the features. Features
computed by other operations have no entry: inside the model's own forward they belong to that forward, elsewhere they are
refused.

The model itself stores only the last complete forward of each thread (for `laconic.provenance(model)`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from laconic.core.tokens import Tokens

_MARK = "_laconic_history"


class History:
    """The tokens after ``block``, without features; the entry before the first block has ``block`` = first - 1.

    ``counts`` are the patch tokens that each block from ``start`` on keeps. ``with_gradient`` is True if gradients were
    recorded.
    """

    def __init__(
        self,
        reduction: Any,
        tokens: Tokens,
        block: int,
        counts: tuple[int, ...],
        start: int,
        previous: History | None = None,
    ) -> None:
        self.reduction, self.tokens, self.block, self.previous = reduction, tokens.replace(x=None), block, previous
        self.counts, self.start, self.with_gradient = counts, start, torch.is_grad_enabled()
        # copied from the call: a block that is recomputed must take the same execution path
        self.fast: bool = previous is not None and previous.fast
        self.answers: bool = previous is not None and previous.answers
        self.shape, self.plain = tokens.shape, tokens.is_plain  # (images, tokens); True if blocks run on them unchanged
        self.restored = False  # True if these are all patches again, restored from the tokens after the last block

    def after(self, block: int, tokens: Tokens) -> History:
        """Return the next entry, for the tokens after ``block``."""
        return History(self.reduction, tokens, block, self.counts, self.start, self)

    def chain(self) -> Iterator[History]:
        """Yield this entry and all previous ones, newest first."""
        entry: History | None = self
        while entry is not None:
            yield entry
            entry = entry.previous

    def entry(self, index: int) -> Tokens:
        """Return the tokens at the input of block ``index``.

        Raises:
            RuntimeError: this forward has no entry before that block.
        """
        for entry in self.chain():
            if entry.block < index:
                return entry.tokens
        raise RuntimeError(f"this forward has no tokens before block {index}: it began at a later block")

    def images(self, start: int, count: int, step: int) -> History:
        """Return the same forward for every ``step``-th image of its batch, ``count`` of them, from image ``start`` on."""
        chosen: History | None = None
        for entry in reversed(list(self.chain())):
            tokens = entry.tokens.images(slice(start, start + count * step, step))
            chosen = History(entry.reduction, tokens, entry.block, entry.counts, entry.start, chosen)
        assert chosen is not None
        return chosen

    def __deepcopy__(self, memo: Any) -> History:
        return self  # immutable, and independent of copies of the model


def mark(x: Tensor, history: History) -> None:
    """Attach a forward's entry to the storage of its features, so that `find` finds it for as long as the storage lives."""
    try:
        storage: Any = x.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return  # torch.func's wrappers have no storage; their forward is found by the running call of the model
    storage.__dict__[_MARK] = (history, x.shape, x.stride(), x.storage_offset())


def find(x: Tensor) -> History | None:
    """Return the entry of marked features, or of a view of them along the batch, with or without their prefix tokens."""
    try:
        found = x.untyped_storage().__dict__.get(_MARK)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    if found is None:
        return None
    history, shape, stride, offset = found
    if x.shape == shape and x.stride() == stride and x.storage_offset() == offset:
        return history
    return _of_view(x, history, shape, stride, offset)


def _of_view(x: Tensor, history: History, shape: torch.Size, stride: tuple[int, ...], offset: int) -> History | None:
    """Return the entry of a view [b, N or L, C] of marked features [B, N, C] (or [B, classes]); None for any other view."""
    if x.dim() != len(shape) or x.dim() < 2 or x.shape[2:] != shape[2:]:
        return None
    if any(a != b and n > 1 for a, b, n in zip(x.stride()[1:], stride[1:], x.shape[1:], strict=True)):
        return None
    first, inside = divmod(int(x.storage_offset()) - offset, max(1, stride[0]))
    prefix = history.tokens.prefix
    whole = x.shape[1] == shape[1] and inside == 0
    patches = x.dim() == 3 and x.shape[1] == shape[1] - prefix and inside == prefix * stride[1]
    step, rest = divmod(x.stride(0), max(1, stride[0])) if x.shape[0] > 1 else (1, 0)
    last = first + (x.shape[0] - 1) * step
    if not (whole or patches) or rest or step < 1 or first < 0 or last >= shape[0]:
        return None
    return history if x.shape[0] == shape[0] else history.images(first, x.shape[0], step)


class Last(threading.local):
    """The last complete forward of each thread: in any mode, and in training mode (for `laconic.losses`)."""

    def __init__(self) -> None:
        self.any: History | None = None
        self.training: History | None = None
