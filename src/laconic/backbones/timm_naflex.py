"""timm's NaFlexVit: images, or patches of images of any shape. Its blocks are those of VisionTransformer and Eva.

Batches with padding are refused, because the number of kept tokens is computed from the number of input tokens, which would
then depend on the other images of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laconic.backbones.timm import _heads, _pooling, _unsupported_reason
from laconic.core.backbone import ModelSpec, register_host


def _image_size(m: Any) -> tuple[int, int]:
    embeds = m.embeds
    if embeds.default_img_size is not None:
        return tuple(embeds.default_img_size)
    cells, (height, width) = embeds.pos_embed_grid_size, embeds.patch_size
    usual = (getattr(m, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    return tuple(usual[1:]) if cells is None else (cells[0] * height, cells[1] * width)


def _example(m: Any) -> Tensor:
    weight = m.embeds.proj.weight
    noise = torch.randn(1, m.in_chans, *_image_size(m), generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def _unmasked(patch_valid: Tensor | None, attn_mask: Tensor | None = None) -> None:
    """Raise for padding or an attention mask; a ``patch_valid`` that masks nothing is accepted."""
    if attn_mask is not None:
        raise ValueError("a reduced NaFlexVit takes no attn_mask: it is made for all tokens and does not fit the kept ones")
    if patch_valid is not None and not bool(patch_valid.all()):
        raise ValueError(
            "this batch has padding (patch_valid is not all True), and the number of tokens that a reduced image keeps would "
            "depend on it; batch images with the same number of patches, or run each image without its padding"
        )


def _forward_embeds(readout: Any, own: Any, x: Tensor, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> dict[str, Tensor]:
    _unmasked(patch_valid, attn_mask)
    out: dict[str, Tensor] = own(x, patch_coord, None, None)
    return out


def _pool(readout: Any, own: Any, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
    _unmasked(patch_valid)
    out: Tensor = readout.pool(own, x, pool_type)
    return out


def _patch_layer(m: Any) -> tuple[nn.Module, tuple[int, int], str]:
    embeds = m.embeds
    last = embeds.is_linear and getattr(embeds, "channels_last", True)
    return embeds.proj, tuple(embeds.patch_size), "hwc" if last else "chw"


register_host(
    ModelSpec(
        path="timm.models.naflexvit.NaFlexVit",
        blocks=lambda m: list(m.blocks),
        prefix=lambda m: (m.num_prefix_tokens, m.has_class_token),
        positions=lambda m: None,  # the table is resized for every input, so there are no fixed positions
        grid=lambda m: m.embeds.dynamic_feat_size(_image_size(m)),
        dim=lambda m: m.embed_dim,
        heads=_heads,
        example=_example,
        pooling=_pooling,
        unsupported_reason=_unsupported_reason,
        grid_of=lambda m, size: tuple(m.embeds.dynamic_feat_size(size)),
        patch_embed=lambda m: m.embeds,
        patch_layer=_patch_layer,
        method_overrides=lambda m: [(m, "_forward_embeds", _forward_embeds), (m, "_pool", _pool)],
    )
)
