"""Gates on the next block: factors on its halves (attention, MLP) and heads, for each image and each of its tokens.

A half adds its output to its input, so a factor of 0 skips it and keeps the residual. Head factors multiply the output of
each attention head and its channels at the input of the MLP. The model's own code runs unchanged: a
`torch.overrides.TorchFunctionMode` intercepts its attention and linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laconic.core.running_calls import calls as running_calls
from laconic.core.shape_types import Float

Half = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Switches:
    """Factors for one block, usually 0 or 1.

    ``halves``: on the output that attention and MLP add to each token. ``heads``: on each head.
    """

    halves: Float[Tensor, "B S N"]  # S: 1 (one factor for both halves) or 2 (one for each)
    heads: Float[Tensor, "B H n"] | None = None  # n: 1, or (in a packed row) its tokens

    def packed(self, index: Tensor) -> Switches:
        """Return the factors of the tokens ``index`` [T] of the flattened batch, as a batch of one image."""
        heads, image = self.heads, index // self.halves.shape[2]
        row = None if heads is None else heads[:, :, 0].index_select(0, image).t().unsqueeze(0)
        return Switches(self.halves.transpose(0, 1).flatten(1).index_select(1, index).unsqueeze(0), row)

    def attention(self, half: Half, x: Tensor) -> Tensor:
        """Return the gated output that attention adds to x."""
        if self.heads is None:
            return self._switched(half(x), 0)
        with _Attention(self.heads.unsqueeze(3)):
            return self._switched(half(x), 0)

    def mlp(self, half: Half, x: Tensor) -> Tensor:
        """Return the gated output that the MLP adds to x."""
        if self.heads is None:
            return self._switched(half(x), -1)
        entrance = _Entrance(self.heads.transpose(1, 2).repeat_interleave(x.shape[2] // self.heads.shape[1], 2))
        with entrance:
            out = half(x)
        if not entrance.inputs:
            raise ValueError("the MLP of this model has no linear layer, so the channels of a head cannot be switched there")
        return self._switched(out, -1)

    def whole(self, block: Half, x: Tensor) -> Tensor:
        """Return the gated output that a parallel block (attention and MLP on the same input) adds to x."""
        if self.heads is not None or self.halves.shape[1] > 1:
            raise ValueError(
                "this model computes attention and MLP in parallel, so they and their heads cannot be switched separately; "
                "switch tokens only (adavit: policies='tokens')"
            )
        return self._switched(block(x) - x, 0)

    def _switched(self, out: Tensor, half: int) -> Tensor:
        return out * self.halves[:, half].unsqueeze(2).to(out.dtype)


class _Attention(TorchFunctionMode):
    """While active, multiplies the output of `scaled_dot_product_attention` by a factor [B, H, n, 1]."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor, self.depth = factor, len(running_calls())

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        own = func is F.scaled_dot_product_attention and len(running_calls()) == self.depth
        return out * self.factor.to(out.dtype) if own else out


class _Entrance(TorchFunctionMode):
    """While active, multiplies the input of the first linear layer, and of others with the same input, by [B, n, C]."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor, self.depth = factor, len(running_calls())
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(running_calls()) == self.depth and func is F.linear and (not self.inputs or args[0] is self.inputs[0]):
            self.inputs.append(args[0])
            args = (args[0] * self.factor.to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))
