"""Fine-tuning of one block so that the next one reproduces its unreduced output, between two trials of Patch Slimming.

The paper (arXiv:2106.02852) processes layers from the last to the first; a layer that has lost patches is trained for a while
to reduce the error of the next layer's output at the patches that the next layer keeps, relative and squared,
|Z' - Z|^2 / |Z|^2.
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
    """A block and the next one, which sees only the tokens with mask 1, and whose output is compared at the tokens ``read``.

    ``mask`` and ``read`` are over all tokens, prefix tokens first.
    """

    number: int
    block: nn.Module
    following: nn.Module
    mask: Tensor
    read: Tensor

    def squared_error(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return |Z' - Z|^2 and |Z|^2: the next block's output Z' for ``x`` and its recorded output Z for all tokens."""
        rows, (_, keywords) = self.read > 0, batch.inputs[self.number + 1]
        true = batch.inputs[self.number + 2][0][:, rows].float()
        with AttentionTap([], self.mask.log().view(1, 1, 1, -1)):  # minus infinity: no token attends to masked tokens
            got = self.following(x, **keywords)[:, rows].float()
        return (got - true).square().sum(), true.square().sum()

    def error(self, batches: Sequence[Batch]) -> float:
        """Return |Z' - Z|^2 / |Z|^2 over all images."""
        error, size = zip(*(self.squared_error(batch.inputs[self.number + 1][0], batch) for batch in batches), strict=True)
        return float(torch.stack(error).sum() / torch.stack(size).sum())


class BlockFinetuning:
    """Train blocks of an unreduced model with Adam, one batch of images per step.

    Args:
        steps: steps for each block and trial; 0 does not change the blocks.
        lr: learning rate.
    """

    def __init__(self, steps: int, lr: float) -> None:
        self.steps, self.lr = steps, lr
        self.before: dict[int, dict[str, Tensor]] = {}  # original weights of the blocks

    def finetune(self, pair: Pair, batches: Sequence[Batch]) -> None:
        """Train the block, starting from its original weights, and record its new output in the batches.

        Raises:
            ValueError: none of its parameters requires gradients.
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
                error, size = pair.squared_error(block(x, **keywords), batch)
                gradients = torch.autograd.grad(error / size, learned, allow_unused=True)
            kept: list[Any] = [parameter.grad for parameter in learned]
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            for parameter, gradient in zip(learned, kept, strict=True):
                parameter.grad = gradient
        self._record(pair, batches)

    def undo(self, pair: Pair, batches: Sequence[Batch]) -> None:
        """Restore the original weights of the block, and record its output with them."""
        if (weights := self.before.pop(pair.number, None)) is not None:
            pair.block.load_state_dict(weights)
            self._record(pair, batches)

    def _record(self, pair: Pair, batches: Sequence[Batch]) -> None:
        for batch in batches:
            batch.pass_through(pair.number, pair.block)
