"""Kept tokens and cost of single images, for methods that choose the token count per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from laconic.analysis import layer_macs as work
from laconic.analysis.macs import block_cost, weigh, weights_of
from laconic.analysis.summary import Observed, Spread
from laconic.core.backbone import find_host
from laconic.core.block_context import BlockContext
from laconic.core.eval_mode import without_recording
from laconic.core.token_reduction import reduction_of
from laconic.core.tokens import Tokens


class Observer:
    """Record the patch tokens of every image after each block while a reduced model runs (see `observing`).

    Of tokens that share the features of others (`Tokens.shared_from`) those that are computed are counted. Their cost is that
    of packed execution: the computed tokens attend to all of their image, and layers outside the blocks run on all.
    """

    def __init__(self, model: nn.Module, convention: str = "matmul") -> None:
        self.reduction, self.weights = reduction_of(model), weights_of(convention)
        self.host, self.entry = find_host(model)
        self.counts = list[list[int]]()
        self.keys = list[int | None]()  # patch tokens of an image that are attended to, if tokens are shared
        self.known = dict[tuple[int, int, int, int | None], int]()

    def record(self) -> None:
        """Add the images of the last forward."""
        entries = [self.reduction.entry(index) for index in range(self.reduction.depth + 1)]
        self.counts += torch.stack([_num_active(tokens) for tokens in entries], 1).tolist()
        self.keys += [len(entries[-1]) if entries[-1].shared_from is not None else None] * entries[0].shape[0]

    @cached_property
    def _sites(self) -> dict[int, BlockContext]:
        return self.reduction.stages.sites()

    def _cost(self, index: int, before: int, after: int, keys: int | None) -> int:
        """Return the MACs of a block; for index -1, of the layers outside the blocks."""
        if (index, before, after, keys) not in self.known:
            config, staging = self.reduction.config, self.reduction.stages
            if index < 0:
                first, last = staging.shapes[0].prefix, staging.shapes[-1].prefix
                macs = weigh(work.ends(self.host, self.entry, before + first, after + last), self.weights)
            else:
                block, shape = self.entry.blocks(self.host)[index], staging.shapes[staging.stage(index)]
                site = self._sites.get(index)
                row = block_cost(index, block, shape, config, site, before, after, self.weights, keys=keys)
                macs = row.macs + row.reducer_macs
            self.known[index, before, after, keys] = macs
        return self.known[index, before, after, keys]

    @property
    def result(self) -> Observed:
        """Mean and spread over the images recorded so far.

        Raises:
            ValueError: no images were recorded.
        """
        if not self.counts:
            raise ValueError("there are no images to observe; pass batches of them, [B, channels, height, width]")
        starts = {
            start: shape.patches
            for start, shape in zip(self.reduction.stages.starts[1:], self.reduction.stages.shapes[1:], strict=True)
        }
        macs = [
            self._cost(-1, row[0], row[-1] if keys is None else keys, None)
            + sum(self._cost(i, starts.get(i, before), after, keys) for i, (before, after) in enumerate(pairwise(row)))
            for row, keys in zip(self.counts, self.keys, strict=True)
        ]
        kept = zip(*(row[1:] for row in self.counts), strict=True)
        return Observed(len(macs), tuple(Spread.of(column) for column in kept), Spread.of(macs))


@contextmanager
def observing(model: nn.Module, convention: str = "matmul") -> Iterator[Observer]:
    """Observe every forward of a reduced model inside the context."""
    observer = Observer(model, convention)
    handle = observer.host.register_forward_hook(lambda *_: observer.record())
    try:
        yield observer
    finally:
        handle.remove()


def observe(model: nn.Module, images: Iterable[Tensor] | Tensor, convention: str = "matmul") -> Observed:
    """Run batches of images; return the mean and spread of their tokens and multiply-adds per image.

    The model runs in evaluation mode; the history of its last forward does not change.

    Raises:
        ValueError: the model is not reduced, or there are no images.
    """
    with observing(model, convention) as observer, without_recording(observer.host), torch.inference_mode():
        for batch in [images] if isinstance(images, Tensor) else images:
            observer.host(batch)
    return observer.result


def _num_active(tokens: Tokens) -> Tensor:
    """Return the number of patch tokens of each image that the following blocks process, [B]."""
    if tokens.shared_from is not None:
        return (tokens.shared_from == 0).sum(1)
    if tokens.keep_mask is None:
        return torch.full_like(tokens.origin_index[:, 0], len(tokens))
    return (tokens.keep_mask > 0).sum(1)
