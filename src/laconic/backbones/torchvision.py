"""torchvision's VisionTransformer: the head reads the class token, and every block has an nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laconic.backbones.multihead import self_attention, unsupported_reason
from laconic.core.backbone import BlockSpec, ModelSpec, register_block, register_host


def _attention(b: Any, x: Tensor) -> Tensor:
    return b.dropout(self_attention(b.self_attention, b.ln_1(x)))


def _mlp(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.ln_2(x))


def _example(m: Any) -> Tensor:
    noise = torch.randn(1, 3, m.image_size, m.image_size, generator=torch.Generator().manual_seed(0))
    return noise.to(m.class_token.device, m.class_token.dtype)


register_block(
    "torchvision.models.vision_transformer.EncoderBlock",
    BlockSpec(_attention, _mlp, opaque_attention=True, after=("ln_2", "mlp")),
)
register_host(
    ModelSpec(
        path="torchvision.models.vision_transformer.VisionTransformer",
        blocks=lambda m: list(m.encoder.layers),
        prefix=lambda m: (1, True),
        positions=lambda m: m.encoder.pos_embedding[0, 1:],
        grid=lambda m: (m.image_size // m.patch_size,) * 2,
        dim=lambda m: m.hidden_dim,
        heads=lambda m: m.encoder.layers[0].num_heads,
        example=_example,
        pooling=lambda m: ("token", False),
        features=lambda m: (m.encoder, "forward"),
        final_norm=lambda m: m.encoder.ln,
        grid_of=lambda m, size: (size[0] // m.patch_size, size[1] // m.patch_size),
        patch_embed=lambda m: m.conv_proj,
        rows=lambda m, before, after: {"encoder.ln": after, "heads": 1},
        unsupported_reason=lambda m: next(filter(None, (unsupported_reason(b.self_attention) for b in m.encoder.layers)), None),
    )
)
