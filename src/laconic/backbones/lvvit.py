"""Laconic's own LV-ViT. Its output also uses the patch tokens: the maximum of their logits for each class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from laconic.backbones.timm import _example
from laconic.core.backbone import BlockSpec, ModelSpec, register_block, register_host


def _attention(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.attn(b.norm1(x))) / b.divisor


def _mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.mlp(b.norm2(x))) / b.divisor


def _pool(readout: Any, own: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
    """Pool by the maximum over tokens that hold a patch, since softly dropped tokens are still present in training."""
    model = readout.host
    if (pool_type or model.global_pool) != "max":
        return readout.pool(own, x, pool_type)
    tokens = readout.tokens(x)
    if tokens is None:
        unweighted: Tensor = own(x, pool_type)
        return unweighted
    out: Tensor = model.combine(x[:, 0], x[:, 1:], tokens.size * tokens.keep_mask_or_ones)
    return out


register_block("laconic.models.block.Block", BlockSpec(_attention, _mlp))
_common = ModelSpec(
    path="laconic.models.lvvit.LVViT",
    blocks=lambda m: list(m.blocks),
    prefix=lambda m: (1, True),
    positions=lambda m: m.pos_embed[0, 1:],
    grid=lambda m: m.patch_embed.grid_size,
    dim=lambda m: m.embed_dim,
    heads=lambda m: m.blocks[0].attn.num_heads,
    example=_example,
    pooling=lambda m: (m.global_pool, False),
    unsupported_reason=lambda m: None,
)
register_host(replace(_common, method_overrides=lambda m: [(m, "pool", _pool)]))
