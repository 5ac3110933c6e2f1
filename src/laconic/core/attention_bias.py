"""What is added to attention logits: log of sizes and of soft decisions, and biases of the host's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.gather import gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens

# What a softly removed token still weighs, so that the logarithm and its gradient stay finite. It must be far below any
# ratio of two attention weights, or an outlier shines through; float16 cannot carry the gradient of so little.
SOFT_FLOOR = 1e-30
SOFT_FLOOR_HALF = 1e-8
# The gradient towards a removed token is its attention weight by the sum of all others', which has no bound: 1 / eps, as in
# DynamicViT's code, is where it stops here.
SOFT_SLOPE = 1e6


class SoftLog(torch.autograd.Function):
    """log(x (1 - floor) + floor) for x in [0, 1], with a gradient of at most `SOFT_SLOPE`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        lifted = x * (1 - floor) + floor
        ctx.save_for_backward(lifted)
        return lifted.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (lifted,) = ctx.saved_tensors
        return (gradient / lifted).clamp(-SOFT_SLOPE, SOFT_SLOPE), None


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An attention mask (boolean or additive) with ``bias`` on top."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def narrowed(mask: Float[Tensor, "*b H T T"], rows: Int[Tensor, "B N"]) -> Float[Tensor, "B H N N"]:
    """A bias for all pairs of T tokens, of each image or the same for all, read at these tokens of each image."""
    every = mask.expand(rows.shape[0], -1, -1, -1)
    there = gather_rows(every.transpose(1, 2), rows)  # [B, N, H, T]
    return gather_rows(there.permute(0, 3, 2, 1), rows).permute(0, 2, 3, 1)


def bias_of(tokens: Tokens) -> Tensor | None:
    """What the gates of the tokens add to attention logits: [B, 1, 1, N], or [B, 1, N, N] with soft decisions, or None.

    Proportional attention adds log(size) for the key (ToMe). A softly removed token is hidden from all but itself:
    M_ij = alive_j + (1 - alive_j) [i = j] multiplies exp(logit) (DynamicViT, eq. 11), that is log M_ij is added.
    """
    bias = None
    if tokens.attn_scale is not None:
        bias = F.pad(tokens.attn_scale.log(), (tokens.prefix, 0)).unsqueeze(1).unsqueeze(1)
    alive = shown_of(tokens)
    if alive is not None:
        itself = torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
        kind = tokens.x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.x.dtype
        floor = SOFT_FLOOR_HALF if dtype == torch.float16 else SOFT_FLOOR
        soft = SoftLog.apply(torch.where(itself, 1.0, alive.unsqueeze(1)), floor).unsqueeze(1)
        bias = soft if bias is None else bias + soft
    return bias


def shown_of(tokens: Tokens) -> Tensor | None:
    """Whether others see each token, prefix tokens among them: [B, N] as a factor, or None where all are seen."""
    if tokens.keep_mask is None and tokens.visible_prefix is None:
        return None
    patches = tokens.keep_mask_or_ones
    if tokens.visible_prefix is None:
        return F.pad(patches, (tokens.prefix, 0), value=1.0)
    return torch.cat([tokens.visible_prefix.to(patches.dtype), patches], 1)
