"""open_clip's VisionTransformer, the image tower of its CLIP and CoCa. Its timm towers are timm's own models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.backbones.multihead import self_attention, unsupported_reason
from laconic.core.backbone import BlockSpec, MethodOverride, ModelSpec, register_block, register_host

AFTER = ("ln_2", "mlp", "ls_2")


def _attention(b: Any, x: Tensor, **none: Any) -> Tensor:  # ``none``: separate keys and values and a mask, which are all None
    return b.ls_1(self_attention(b.attn, b.ln_1(x)))


def _custom_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.ls_1(b.ln_attn(b.attn(b.ln_1(x), **kw)))


def _mlp(b: Any, x: Tensor) -> Tensor:
    return b.ls_2(b.mlp(b.ln_2(x)))


def _heads(m: Any) -> int:
    return m.transformer.resblocks[0].attn.num_heads


def _example(m: Any) -> Tensor:
    noise = torch.randn(1, m.conv1.in_channels, *m.image_size, generator=torch.Generator().manual_seed(0))
    return noise.to(m.conv1.weight.device, m.conv1.weight.dtype)


def _pooling(m: Any) -> tuple[str, bool]:
    kind = {"tok": "token", "avg": "avg"}.get(m.pool_type, "none")
    return (kind, False) if m.attn_pool is None else ("map", True)


def _pools(m: Any) -> list[Any]:
    """Return the attention pools that read the tokens of the blocks."""
    pools = [] if m.attn_pool is None else [m.attn_pool]
    return [*pools, m.attn_pool_contrastive] if pools and getattr(m, "attn_pool_type", "") == "parallel" else pools


def _global_pool(readout: Any, own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled, tokens = own(x)
    if readout.host.attn_pool is None:  # with an attention pool, x is its output
        pooled = readout.pool(lambda weighed, kind: own(weighed)[0], x)
    return pooled, tokens


def _pool_attends(readout: Any, own: Any, query: Tensor, key: Tensor, value: Tensor, **kw: Any) -> Any:
    bias = readout.key_bias(key)
    more = {} if bias is None else {"key_padding_mask": bias}  # a float mask is added to the logits
    return own(query, key, value, **kw, **more)


def _method_overrides(m: Any) -> list[MethodOverride]:
    return [(m, "_global_pool", _global_pool), *((pool.attn, "forward", _pool_attends) for pool in _pools(m))]


def _unsupported_reason(m: Any) -> str | None:
    if getattr(m.patch_dropout, "prob", 0) > 0:
        return "its patch dropout already removes patches in training; create it with patch_dropout=0"
    hidden = (b.attn for b in m.transformer.resblocks if isinstance(b.attn, nn.MultiheadAttention))
    return next(filter(None, map(unsupported_reason, hidden)), None)


def _rows(m: Any, before: int, after: int) -> dict[str, int]:
    pooled = 1 if m.final_ln_after_pool and m.attn_pool is None else after
    if m.attn_pool is not None and not getattr(m, "attn_pool_type", ""):
        pooled = len(m.attn_pool.query)
    return {"ln_pre": before, "ln_post": pooled, "attn_pool": 0, "attn_pool_contrastive": 0}


def _products(m: Any, before: int, after: int) -> int:
    """Return the multiply-adds of the projection and the attention pools, which are not layers (`_rows` excludes them)."""
    pools = [pool for pool in (m.attn_pool, getattr(m, "attn_pool_contrastive", None)) if pool is not None]
    readers, macs = _pools(m), 0
    for pool in pools:
        queries, width = pool.query.shape
        keys, wide = (after, pool.attn.kdim) if pool in readers else (len(m.attn_pool.query), pool.attn.kdim)
        macs += 2 * width * (queries * width + keys * wide + queries * keys)
    rows = after if m.pool_type == "none" and not pools else 1
    return macs + (0 if m.proj is None else rows * m.proj.numel())


register_block("open_clip.transformer.ResidualAttentionBlock", BlockSpec(_attention, _mlp, opaque_attention=True, after=AFTER))
register_block("open_clip.transformer.CustomResidualAttentionBlock", BlockSpec(_custom_attention, _mlp, after=AFTER))
register_host(
    ModelSpec(
        path="open_clip.transformer.VisionTransformer",
        blocks=lambda m: list(m.transformer.resblocks),
        prefix=lambda m: (1, True),
        positions=lambda m: m.positional_embedding[1:],
        grid=lambda m: m.grid_size,
        dim=lambda m: m.transformer.width,
        heads=_heads,
        example=_example,
        pooling=_pooling,
        unsupported_reason=_unsupported_reason,
        method_overrides=_method_overrides,
        features=lambda m: (m, "forward"),
        head_methods=("_pool",),
        final_norm=lambda m: None if m.final_ln_after_pool else m.ln_post,
        grid_of=lambda m, size: m.grid_size,
        patch_embed=lambda m: m.conv1,
        rows=_rows,
        extra_macs=_products,
    )
)
