"""Laconic's own CvT: three stages, all with keys from the grid; TPS reduces at blocks 2, 5 and 8 of the last stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from laconic.backbones.timm import _example
from laconic.core.backbone import BlockSpec, ModelSpec, StageSpec, register_block, register_host


def _attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path(b.attn(b.norm1(x), **kw))


def _mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.mlp(b.norm2(x)))


def _stages(m: Any) -> tuple[StageSpec, ...]:
    shapes = []
    for stage, grid in zip(m.stages, m.grid_sizes, strict=True):
        attn = stage.blocks[0].attn
        facts = (len(stage.blocks), attn.proj.in_features, attn.num_heads, grid)
        shapes.append(StageSpec(*facts, prefix=attn.prefix, has_cls=attn.prefix > 0))
    return tuple(shapes)


def _at(m: Any) -> tuple[int, ...]:
    first = sum(len(stage.blocks) for stage in m.stages[:-1])
    return tuple(first + block for block in (2, 5, 8) if block < len(m.stages[-1].blocks))


register_block("laconic.models.cvt.Block", BlockSpec(_attention, _mlp, grid="grid"))
register_host(
    ModelSpec(
        path="laconic.models.cvt.ConvolutionalVisionTransformer",
        blocks=lambda m: [block for stage in m.stages for block in stage.blocks],
        prefix=lambda m: (1, True),  # prefix, grid, dim and heads are those of the last stage, which the head reads
        positions=lambda m: None,
        grid=lambda m: m.grid_sizes[-1],
        dim=lambda m: m.embed_dim,
        heads=lambda m: m.stages[-1].blocks[0].attn.num_heads,
        example=_example,
        pooling=lambda m: (m.global_pool or "none", False),
        unsupported_reason=lambda m: None,
        stages=_stages,
        at=_at,
    )
)
