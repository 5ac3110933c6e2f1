"""Laconic's own PS-ViT: the plain layers after the sampling are its blocks, and those are reduced.

Patch tokens are in the order of their sampling points, column by column.
"""

from __future__ import annotations

from typing import Any

from laconic.backbones import lvvit as _blocks  # noqa: F401  (its blocks are LV-ViT's)
from laconic.backbones.timm import _example
from laconic.core.backbone import ModelSpec, register_host


def _at(m: Any) -> tuple[int, ...]:
    depth = len(m.blocks)
    return tuple(sorted({round(depth * part / 4) for part in (1, 2, 3)}))  # 2, 5, 8 of 10, as in TPS


register_host(
    ModelSpec(
        path="laconic.models.psvit.PSViT",
        blocks=lambda m: list(m.blocks),
        prefix=lambda m: (1, True),
        positions=lambda m: None,  # the positions differ from image to image
        grid=lambda m: m.patch_embed.grid_size,
        dim=lambda m: m.embed_dim,
        heads=lambda m: m.blocks[0].attn.num_heads,
        example=_example,
        pooling=lambda m: (m.global_pool, False),
        unsupported_reason=lambda m: None,
        at=_at,
    )
)
