"""Laconic's own PVT: four stages, three with keys from the grid; TPS reduces at the first blocks of the last three."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from laconic.backbones.timm import _example
from laconic.core.backbone import BlockSpec, ModelSpec, StageSpec, register_block, register_host

STAGES = (1, 2, 3, 4)  # as in the names of its submodules


def _attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path(b.attn(b.norm1(x), **kw))


def _mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.mlp(b.norm2(x)))


def _blocks(m: Any) -> list[list[Any]]:
    return [list(getattr(m, f"block{stage}")) for stage in STAGES]


def _stages(m: Any) -> tuple[StageSpec, ...]:
    shapes = []
    for stage, blocks in zip(STAGES, _blocks(m), strict=True):
        attn, last = blocks[0].attn, stage == STAGES[-1]
        facts = (len(blocks), attn.proj.in_features, attn.num_heads, m.grid_size(stage))
        shapes.append(StageSpec(*facts, prefix=int(last), has_cls=last))
    return tuple(shapes)


def _at(m: Any) -> tuple[int, ...]:
    depths = [len(blocks) for blocks in _blocks(m)]
    return tuple(sum(depths[:stage]) for stage in STAGES[:-1])


register_block("laconic.models.pvt.GridBlock", BlockSpec(_attention, _mlp, grid="grid"))
register_block("laconic.models.pvt.Block", BlockSpec(_attention, _mlp))
register_host(
    ModelSpec(
        path="laconic.models.pvt.PyramidVisionTransformer",
        blocks=lambda m: [block for blocks in _blocks(m) for block in blocks],
        prefix=lambda m: (1, True),  # prefix, grid, dim and heads are those of the last stage, which the head reads
        positions=lambda m: None,
        grid=lambda m: m.grid_size(STAGES[-1]),
        dim=lambda m: m.embed_dim,
        heads=lambda m: m.block4[0].attn.num_heads,
        example=_example,
        pooling=lambda m: (m.global_pool or "none", False),
        unsupported_reason=lambda m: None,
        stages=_stages,
        at=_at,
    )
)
