"""Calibration of Patch Slimming (Tang et al., CVPR 2022, arXiv:2106.02852): choose the patch positions that each block keeps.

Layers are processed from the last to the first. With P the attention matrices of a layer (one a head h), D the diagonal
mask of the tokens it keeps, and Z its input, the impact of token i of layer t on the output of the last layer L is

    s_t,i = sum over all tuples of heads of |A_t[:, i] U_t[i, :]|^2,   A_t = D_L P_L ... D_t+1 P_t+1,   U_t = P_t |Z_t-1|.

There are H^(L-t) tuples, but a sum over them is a product of sums: with G_L = I and

    G_t = sum_h P_t+1^T D_t+1 G_t+1 D_t+1 P_t+1,   s_t = diag(G_t) * sum_h |(P_t |Z_t-1|)_i|^2

the cost is O(L H N^3). Here G is a mean over heads, which differs only by one factor per layer. Prefix tokens are never
pruned. D_L keeps the tokens of the last layer that are read: the prefix tokens, or in a model that averages its patches the
kept ones. A layer without a reducer prunes nothing: its D is I.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.backbone import HOSTS
from laconic.core.eval_mode import evaluating
from laconic.core.patching import attach, detach
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import TokenReduction, reduction_of
from laconic.methods.patch_slimming.block_finetuning import BlockFinetuning, Pair
from laconic.methods.patch_slimming.method import PatchSlimming
from laconic.methods.patch_slimming.patch_importance import Batch, back, record

Images = Tensor | Iterable[Any]


@torch.no_grad()
def calibrate(
    model: nn.Module, images: Images, *, tolerance: float | None = None, step: int = 10, tuning: int = 0, lr: float = 1e-4
) -> nn.Module:
    """Choose the patches that a model reduced by ``patch-slimming`` keeps, in place; the same object is returned.

    The positions become buffers of the model, so `laconic.save` writes them. Calibration uses the whole attention of the
    unreduced model, one block at a time; q and k of all images are held in memory (deit_small: 5 MB an image, with a
    tolerance 11 MB).

    Args:
        model: reduced by ``patch-slimming``. With a tolerance it gets a schedule of its own at all blocks.
        images: preprocessed for the model: a batch, batches, or (batch, anything) pairs of a loader. A few hundred suffice.
        tolerance: None keeps as many patches at each block as the schedule says. A number is the paper's epsilon: from the
            last block down, a block keeps more and more patches until the next block's kept outputs equal those of the
            unreduced model up to this relative squared error, |Z' - Z|^2 / |Z|^2. 0 prunes only patches that are not read;
            the last block, of which only the class token is read, always keeps one patch, and with infinity so do all
            other blocks.
        step: number of patches added per trial (the paper's r').
        tuning: steps of fine-tuning of each block that loses patches, before its error is measured, as in the paper, see
            `laconic.methods.patch_slimming.block_finetuning`. The paper does not give their number; 0 only finds positions
            and changes no weights.
        lr: learning rate of the fine-tuning; not published either.

    The paper continues from the weights of the previous trial, with the features of the original model as the target. Here
    each trial starts from the block's original weights, and the target of the block below is the output of the fine-tuned
    block for all its tokens. Fine-tune the whole model afterwards, as the paper does.

    Raises:
        ValueError: the model is not reduced, or by another method; images of another size, or none; a tolerance below 0,
            or one for a model that reads all its tokens; a block to be fine-tuned has no trainable parameters.
    """
    reduction = reduction_of(model)
    _check(reduction, tolerance, step)
    if not isinstance(tuning, int) or tuning < 0 or not lr > 0:
        raise ValueError(f"tuning must be a number of steps, 0 or more, and lr positive; got tuning={tuning!r}, lr={lr!r}")
    built: Any = {int(block): reducer for block, reducer in reduction.reducers.items()}
    counts = None if tolerance is not None else {block: len(reducer.kept) for block, reducer in built.items()}
    sites = set(range(reduction.depth)) if counts is None else set(counts)
    search = Search(reduction, counts, math.inf if tolerance is None else tolerance, step, BlockFinetuning(tuning, lr))
    with _unreduced(model, reduction):
        batches = [
            record(model, reduction, batch, min(sites), counts is None or tuning > 0) for batch in _batches(reduction, images)
        ]
        if not batches:
            raise ValueError("there are no images to calibrate with; pass one or more batches [B, channels, height, width]")
        kept = search.run(batches, sites)
    if counts is None:
        fitting = _schedule({block: len(order) for block, order in kept.items()}, math.prod(reduction.grid))
        from laconic.api import (
            reduce_,
            restore_,
        )  # a higher layer; needed only if counts were searched

        host, example = reduction.model, batches[0].image
        restore_(host)
        reduce_(host, reduction.config, schedule=fitting, example=example)
        reduction = reduction_of(host)
    for block in reduction.schedule.at:
        reducer: Any = reduction.reducer(block)
        reducer.hold(torch.tensor(kept[block], device=reducer.kept.device))
    return model


@dataclass(frozen=True)
class Search:
    """Search from the last block to the first for the positions to keep; those of the block above come first."""

    reduction: TokenReduction
    counts: dict[int, int] | None
    tolerance: float
    step: int
    finetuning: BlockFinetuning

    def run(self, batches: list[Batch], sites: set[int]) -> dict[int, list[int]]:
        """Return the positions that each block keeps, the most important first."""
        prefix, last, order, kept = self.reduction.prefix, self.reduction.depth - 1, list[int](), dict[int, list[int]]()
        tokens = prefix + math.prod(self.reduction.grid)
        mask = torch.ones(tokens, device=batches[0].image.device)
        images = sum(len(batch.energies[last]) for batch in batches)
        impact = [torch.eye(tokens, device=mask.device).expand(len(b.energies[last]), -1, -1) for b in batches]
        for block in range(last, min(sites) - 1, -1):
            if block in sites:
                parts = [g.diagonal(dim1=1, dim2=2) * b.energies[block] for g, b in zip(impact, batches, strict=True)]
                score = torch.stack([part.sum(0) for part in parts]).sum(0)[prefix:] / images
                ranking = score.argsort(descending=True, stable=True).tolist()
                order = self._choose(block, order, ranking, mask, batches)
                kept[block] = order
            mask = self._output_mask(block, order if block in sites else list(range(tokens - prefix)), mask)
            if block > min(sites):
                impact = [back(g, batch.seen[block].matrix, mask) for g, batch in zip(impact, batches, strict=True)]
        return kept

    def _choose(self, block: int, above: list[int], ranking: list[int], mask: Tensor, batches: list[Batch]) -> list[int]:
        """Return ``above`` and the best other positions: as many as the schedule says, or as the tolerance needs."""
        last = block == self.reduction.depth - 1
        if self.counts is not None:
            order = _longer(above, ranking, self.counts[block])
            if not last and len(order) < len(ranking):
                self.finetuning.finetune(self._pair(block, order, mask), batches)
            return order
        if last:
            return ranking[:1]
        tried = 0
        for r in range(0, len(ranking) + self.step, self.step):
            order = _longer(above, ranking[:r], len(ranking))
            pair = self._pair(block, order, mask)
            if len(order) == len(ranking):
                self.finetuning.undo(pair, batches)
                break
            if len(order) > tried:
                self.finetuning.finetune(pair, batches)
                if pair.error(batches) <= self.tolerance:
                    break
            tried = len(order)
        return order

    def _pair(self, block: int, order: list[int], read: Tensor) -> Pair:
        """Return the pair of a block and the next one, which sees only the tokens ``order``."""
        blocks = HOSTS[self.reduction.host_path].blocks(self.reduction.model)
        return Pair(block, blocks[block], blocks[block + 1], self._mask(order, read), read)

    def _mask(self, order: list[int], like: Tensor) -> Tensor:
        mask = torch.zeros_like(like)
        mask[: self.reduction.prefix] = 1
        mask[self.reduction.prefix + torch.tensor(order, dtype=torch.long, device=mask.device)] = 1
        return mask

    def _output_mask(self, block: int, order: list[int], like: Tensor) -> Tensor:
        """Return D of a block: the mask of the tokens it keeps, or of the last block of those that are read."""
        if block < self.reduction.depth - 1:
            return self._mask(order, like)
        mask = self._mask([] if _class_is_read(self.reduction) else order, like)
        kind, prefix_too = self.reduction.pooling
        if kind not in ("token", "none") and not prefix_too:
            mask[: self.reduction.prefix] = 0
        return mask


def _longer(above: list[int], ranking: list[int], count: int) -> list[int]:
    """Return ``above`` and the first of ``ranking`` that are not in it, up to ``count`` positions."""
    inside = set(above)
    return [*above, *(i for i in ranking if i not in inside)][: max(count, len(above))]


def _class_is_read(reduction: TokenReduction) -> bool:
    return reduction.has_cls and reduction.pooling[0] == "token"


def _schedule(counts: dict[int, int], patches: int) -> Schedule:
    """Return the schedule of the counts at the blocks that drop any patch."""
    before, falling = patches, dict[int, int]()
    for block, count in sorted(counts.items()):
        if count < before:
            falling[block] = before = count
    return Schedule.keep_counts(falling)


def _check(reduction: TokenReduction, tolerance: float | None, step: int) -> None:
    if not isinstance(reduction.config, PatchSlimming):
        raise ValueError(f"only patch-slimming can be calibrated; this model is reduced by {reduction.config.info.name}")
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ValueError(f"tolerance must be None or a relative squared error of at least 0, not {tolerance!r}")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be a whole number of patches, at least 1; got {step!r}")
    if tolerance is not None and not _class_is_read(reduction):
        raise ValueError(
            f"this model reads all its tokens in the end (pooling {reduction.pooling[0]!r}), so with a tolerance none of them "
            "can be dropped; calibrate the positions for given counts instead: reduce_ with keep=..., and tolerance=None"
        )


@contextmanager
def _unreduced(model: nn.Module, reduction: TokenReduction) -> Iterator[None]:
    host: Any = reduction.model
    entry = HOSTS[reduction.host_path]
    detach(host, entry)
    try:
        with evaluating(model):
            yield
    finally:
        attach(host, entry, reduction)


def _batches(reduction: TokenReduction, images: Images) -> Iterator[Tensor]:
    reference = next(reduction.model.parameters())
    for batch in [images] if isinstance(images, Tensor) else images:
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        if not reduction.entry_of_host.takes(batch) or not len(batch):
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"images must be batches {reduction.entry_of_host.input_axes}, got {found}")
        yield batch.to(reference.device, reference.dtype)
