"""An explicit forward of torch.nn.MultiheadAttention, whose own fused attention call cannot be intercepted."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def self_attention(attn: Any, x: Tensor) -> Tensor:
    """Compute ``attn(x, x, x, need_weights=False)`` for tokens [B, N, C], batch first, without masks."""

    def heads(part: Tensor) -> Tensor:
        return part.reshape(*part.shape[:2], attn.num_heads, attn.head_dim).transpose(1, 2)

    q, k, v = map(heads, F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, 2))
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.dropout if attn.training else 0.0)
    return F.linear(mixed.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)


def unsupported_reason(attn: Any) -> str | None:
    """Return the reason why `self_attention` does not reproduce this attention, or None."""
    if not attn.batch_first:
        return "its nn.MultiheadAttention has batch_first=False; make it with batch_first=True"
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
        return "its nn.MultiheadAttention has keys of another width, or keys that are not tokens (add_bias_kv, add_zero_attn)"
    return None
