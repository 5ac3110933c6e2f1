"""Biases on attention logits: logarithms of token sizes and of soft keep decisions, combined with the model's own masks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.gather import gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens

# The weight of a softly dropped token, so that the logarithm and its gradient stay finite. It must be far below any ratio of
# two attention weights, or an outlier remains visible; float16 cannot represent the gradient of such a small number.
SOFT_FLOOR = 1e-30
SOFT_FLOOR_HALF = 1e-8
# The gradient towards a dropped token is its attention weight divided by the sum of all others, which is unbounded; it is
# clamped at 1 / eps, as in DynamicViT's code.
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
    """Add ``bias`` to an attention mask (boolean or additive)."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def narrowed(mask: Float[Tensor, "*b H T T"], rows: Int[Tensor, "B N"]) -> Float[Tensor, "B H N N"]:
    """Select these tokens of each image from a bias for all pairs of T tokens (one for each image, or one for all)."""
    every = mask.expand(rows.shape[0], -1, -1, -1)
    there = gather_rows(every.transpose(1, 2), rows)  # [B, N, H, T]
    return gather_rows(there.permute(0, 3, 2, 1), rows).permute(0, 2, 3, 1)


def bias_of(tokens: Tokens) -> Tensor | None:
    """Return the bias of the tokens on attention logits: [B, 1, 1, N], or [B, 1, N, N] with soft decisions, or None.

    Proportional attention adds log(size) for the key (ToMe). A softly dropped token is hidden from all tokens but itself:
    M_ij = keep_j + (1 - keep_j) [i = j] multiplies exp(logit) (DynamicViT, eq. 11), so log M_ij is added to the logit.
    """
    bias = None
    if tokens.attn_scale is not None:
        bias = F.pad(tokens.attn_scale.log().reshape(tokens.shape[0], 1, 1, -1), (tokens.prefix, 0))
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
    """Return the visibility of each token to the others, prefix tokens included: a factor [B, N]; None if all are visible."""
    if tokens.keep_mask is None and tokens.visible_prefix is None:
        return None
    patches = tokens.keep_mask_or_ones
    if tokens.visible_prefix is None:
        return F.pad(patches, (tokens.prefix, 0), value=1.0)
    return torch.cat([tokens.visible_prefix.to(patches.dtype), patches], 1)
