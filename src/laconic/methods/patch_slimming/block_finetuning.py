"""Fine-tuning of one block so that the next one puts out what it did before: what Patch Slimming does between two trials.

The paper (arXiv:2106.02852) goes down layer by layer; a layer that has lost patches is trained for a while to bring down the
error of what the next layer puts out at the patches that it keeps, relative and squared, |Z' - Z|^2 / |Z|^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laconic.core.attention import AttentionTap
from laconic.methods.patch_slimming.patch_importance import Batch


@dataclass(frozen=True)
class Pair:
    """A block and the next one, of which the latter gets the tokens with mask 1 alone, and ``read`` of what it puts out counts.

    ``mask`` and ``read`` are over all tokens, prefix ones first.
    """

    number: int
    block: nn.Module
    following: nn.Module
    mask: Tensor
    read: Tensor

    def off(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the next block makes of ``x``, against what it made of all tokens: squared distance, and squared length."""
        rows, (_, keywords) = self.read > 0, batch.inputs[self.number + 1]
        true = batch.inputs[self.number + 2][0][:, rows].float()
        with AttentionTap([], self.mask.log().view(1, 1, 1, -1)):  # minus infinity: for the others as if they were not there
            got = self.following(x, **keywords)[:, rows].float()
        return (got - true).square().sum(), true.square().sum()

    def error(self, batches: Sequence[Batch]) -> float:
        """|Z' - Z|^2 / |Z|^2 over all images."""
        off, size = zip(*(self.off(batch.inputs[self.number + 1][0], batch) for batch in batches), strict=True)
        return float(torch.stack(off).sum() / torch.stack(size).sum())


class Mending:
    """Trains blocks of an unreduced model for so many steps of Adam; a batch of images is one step.

    Args:
        steps: for each block and trial; 0 leaves the blocks as they are.
        lr: learning rate.
    """

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = steps, lr
        self.before: dict[int, dict[str, Tensor]] = {}  # weights of blocks as they came

    def mend(self, pair: Pair, batches: Sequence[Batch]) -> None:
        """Train the block, from its own weights on; what comes out of it is noted in the batches.

        Raises:
            ValueError: no parameter of it may be trained.
        """
        if not self.steps:
            return
        block, number = pair.block, pair.number
        self.undo(pair, batches)
        self.before[number] = {name: value.clone() for name, value in block.state_dict().items()}
        learned = [parameter for parameter in block.parameters() if parameter.requires_grad]
        if not learned:
            raise ValueError(f"block {number} cannot be fine-tuned: none of its parameters requires gradients")
        optimizer = torch.optim.Adam(learned, lr=self.lr)
        for step in range(self.steps):
            batch = batches[step % len(batches)]
            x, keywords = batch.inputs[number]
            with torch.enable_grad():
                off, size = pair.off(block(x, **keywords), batch)
                gradients = torch.autograd.grad(off / size, learned, allow_unused=True)
            kept: list[Any] = [parameter.grad for parameter in learned]
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            for parameter, gradient in zip(learned, kept, strict=True):
                parameter.grad = gradient
        self._note(pair, batches)

    def undo(self, pair: Pair, batches: Sequence[Batch]) -> None:
        """The block's own weights again, and what comes out of it by them."""
        if (weights := self.before.pop(pair.number, None)) is not None:
            pair.block.load_state_dict(weights)
            self._note(pair, batches)

    def _note(self, pair: Pair, batches: Sequence[Batch]) -> None:
        for batch in batches:
            batch.pass_through(pair.number, pair.block)
