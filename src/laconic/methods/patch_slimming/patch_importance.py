"""Importance of patches for a model's output: the scores of `laconic.calibrate`, and the recorded inputs they need."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laconic.core.attention import AttentionTap, AttentionView
from laconic.core.backbone import HOSTS, path_of
from laconic.core.shape_types import Float
from laconic.core.token_reduction import TokenReduction
from laconic.core.tokens import Tokens


def back(g: Float[Tensor, "B N N"], weights: Float[Tensor, "B H N N"], mask: Float[Tensor, " N"]) -> Float[Tensor, "B N N"]:
    """Return G of the layer below: the mean over heads of P^T D G D P."""
    masked = g * mask * mask.unsqueeze(1)
    return (weights.transpose(-2, -1) @ (masked.unsqueeze(1) @ weights)).mean(1)


def energy(weights: Float[Tensor, "B H N N"], x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N"]:
    """Return sum_h |(P |Z|)_i|^2 of every token i."""
    return (weights @ x.float().abs().unsqueeze(1)).square().sum((1, 3))


@dataclass
class Batch:
    """Recorded attention and inputs of the blocks for one batch of images."""

    image: Tensor  # the first one
    seen: dict[int, AttentionView]  # q and k of each block
    energies: dict[int, Tensor]
    inputs: dict[int, tuple[Tensor, dict[str, Any]]]  # if recorded: x and keywords of each block; key depth: the last output
    prefix: int
    has_cls: bool

    def record_attention(self, block: int, module: nn.Module, x: Tensor, calls: list[dict[str, Any]]) -> None:
        """Record q and k of a block whose input is ``x``."""
        seen = AttentionView.of(calls, Tokens.start(x, self.prefix, self.has_cls), f"block {block} ({path_of(type(module))})")
        # clones: q, k and v are views of one tensor, which would otherwise be kept in memory as a whole
        self.seen[block] = dataclasses.replace(seen, q=seen.q.clone(), k=seen.k.clone(), v=seen.v[..., :0].clone())

    def pass_through(self, block: int, module: nn.Module) -> None:
        """Run a block again after its weights have changed: record its attention and output for the recorded input."""
        calls, (x, keywords) = list[dict[str, Any]](), self.inputs[block]
        with AttentionTap(calls):
            output = module(x, **keywords)
        self.record_attention(block, module, x, calls)
        self.inputs[block + 1] = (output, self.inputs[block + 1][1])


def record(model: nn.Module, reduction: TokenReduction, images: Tensor, lowest: int, inputs: bool) -> Batch:
    """Run a batch, and record the attention (and with ``inputs`` the inputs) of the blocks from ``lowest`` on."""
    batch, calls = Batch(images[:1], {}, {}, {}, reduction.prefix, reduction.has_cls), list[dict[str, Any]]()
    patches, blocks = math.prod(reduction.grid), HOSTS[reduction.host_path].blocks(reduction.model)

    def note(block: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0]
        if x.shape[1] != reduction.prefix + patches:
            raise ValueError(
                f"got images of {x.shape[1] - reduction.prefix} patches, and this model was reduced for {patches}; "
                "calibrate on images of its own size"
            )
        batch.record_attention(block, module, x, calls)
        calls.clear()
        batch.energies[block] = energy(batch.seen[block].matrix, x)
        if inputs:
            batch.inputs[block], batch.inputs[block + 1] = (x, kwargs), (output, {})

    def forget(module: nn.Module, args: Any) -> None:
        calls.clear()

    hooks: list[Any] = []
    for i, block in enumerate(blocks):
        if i >= lowest:
            hook = block.register_forward_hook(lambda *a, i=i: note(i, *a), with_kwargs=True)
            hooks += [block.register_forward_pre_hook(forget), hook]
    try:
        with AttentionTap(calls):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return batch
