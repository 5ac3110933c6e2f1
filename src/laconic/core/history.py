"""The state of one forward, kept with its tokens.

Each entry holds the tokens as one block left them (without their features), and the entry before it; the chain of entries
is the forward. The newest entry is kept with the storage of the features that go on, so any code that continues with those
features finds it: the next block, a checkpointed block that is recomputed (in any thread), a head that runs later, a hook.
It survives views and `detach`, is not copied or saved with a tensor, and is freed with the features. Features that an
operation has made of others have no entry: inside the model's own forward they belong to that forward, elsewhere they are
refused.

The model itself keeps nothing but, for each thread, the last complete forward (for `laconic.provenance(model)`).
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
    """The tokens after ``block`` (or as they entered the first one, where it is the block before that), without features.

    ``counts`` are the patch tokens that the blocks from ``start`` on leave. ``with_gradient``: were gradients recorded?
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
        # those of the call: a block that is computed again must go the same way
        self.fast: bool = previous is not None and previous.fast
        self.answers: bool = previous is not None and previous.answers
        self.shape, self.plain = tokens.shape, tokens.is_plain  # images and tokens; do blocks run on them as they stand?
        self.restored = False  # are these patches that were given their tokens' features again, after the last block?

    def after(self, block: int, tokens: Tokens) -> History:
        """The next entry."""
        return History(self.reduction, tokens, block, self.counts, self.start, self)

    def chain(self) -> Iterator[History]:
        """This entry and all before it, last first."""
        entry: History | None = self
        while entry is not None:
            yield entry
            entry = entry.previous

    def entry(self, index: int) -> Tokens:
        """The tokens that block ``index`` got: those that the blocks before it left.

        Raises:
            RuntimeError: this forward did not get as far.
        """
        for entry in self.chain():
            if entry.block < index:
                return entry.tokens
        raise RuntimeError(f"this forward has no tokens before block {index}: it began at a later block")

    def images(self, start: int, count: int, step: int) -> History:
        """The same forward for some images of its batch."""
        chosen: History | None = None
        for entry in reversed(list(self.chain())):
            tokens = entry.tokens.images(slice(start, start + count * step, step))
            chosen = History(entry.reduction, tokens, entry.block, entry.counts, entry.start, chosen)
        assert chosen is not None
        return chosen

    def __deepcopy__(self, memo: Any) -> History:
        return self  # immutable, and a copy of a model has nothing to do with it


def mark(x: Tensor, history: History) -> None:
    """Let features be found to be of this forward, for as long as their storage lives."""
    try:
        storage: Any = x.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return  # torch.func's wrappers have none; they are found by the call of the model that is running
    storage.__dict__[_MARK] = (history, x.shape, x.stride(), x.storage_offset())


def find(x: Tensor) -> History | None:
    """The entry of features that were marked, or of a view of them along the batch, with or without their prefix tokens."""
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
    """The entry of a view [b, N or L, C] of marked features [B, N, C] (or [B, classes]); None for any other view."""
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
    """The last complete forward of each thread: of any kind, and in training mode (whose losses are to be asked for)."""

    def __init__(self) -> None:
        self.any: History | None = None
        self.training: History | None = None
