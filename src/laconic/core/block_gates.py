"""Switches: which halves and which heads of the next block count for an image, and for which of its tokens.

A block's half adds something to its input, so to skip it is to multiply that by 0: the residual goes on. What a head of
the attention hands on, and its channels at the input of the MLP, are multiplied likewise. The host's own code runs on: what
its linear layers and its attention get and give is seen by a `torch.overrides.TorchFunctionMode`.
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

    ``halves``: on what attention and MLP add to each token (one for both, or one for each). ``heads``: on each head.
    """

    halves: Float[Tensor, "B S N"]
    heads: Float[Tensor, "B H n"] | None = None  # n: 1, or (in a packed row) its tokens

    def packed(self, index: Tensor) -> Switches:
        """Those of the tokens ``index`` [T] of the flattened batch, as a batch of one image."""
        heads, image = self.heads, index // self.halves.shape[2]
        row = None if heads is None else heads[:, :, 0].index_select(0, image).t().unsqueeze(0)
        return Switches(self.halves.transpose(0, 1).flatten(1).index_select(1, index).unsqueeze(0), row)

    def attention(self, half: Half, x: Tensor) -> Tensor:
        """What the attention adds to x."""
        if self.heads is None:
            return self._switched(half(x), 0)
        with _Attention(self.heads.unsqueeze(3)):
            return self._switched(half(x), 0)

    def mlp(self, half: Half, x: Tensor) -> Tensor:
        """What the MLP adds to x."""
        if self.heads is None:
            return self._switched(half(x), -1)
        entrance = _Entrance(self.heads.transpose(1, 2).repeat_interleave(x.shape[2] // self.heads.shape[1], 2))
        with entrance:
            out = half(x)
        if not entrance.inputs:
            raise ValueError("the MLP of this host has no linear layer, so the channels of a head cannot be switched there")
        return self._switched(out, -1)

    def whole(self, block: Half, x: Tensor) -> Tensor:
        """What a block adds to x that has attention and MLP side by side."""
        if self.heads is not None or self.halves.shape[1] > 1:
            raise ValueError(
                "this host computes attention and MLP side by side, so neither they nor heads can be switched alone; switch "
                "tokens only (adavit: policies='tokens')"
            )
        return self._switched(block(x) - x, 0)

    def _switched(self, out: Tensor, half: int) -> Tensor:
        return out * self.halves[:, half].unsqueeze(2).to(out.dtype)


class _Attention(TorchFunctionMode):
    """While active, multiplies what `scaled_dot_product_attention` gives by a factor [B, H, n, 1]."""

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
    """While active, multiplies the input of the first linear layer, and of those beside it, by a factor [B, n, C]."""

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
