"""Attention and MLP halves of the layers of transformers' vision models, 4.57 and 5; see `laconic.backbones.transformers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from laconic.core.backbone import BlockSpec, register_block


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _vit_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    added = _first(b.attention(b.layernorm_before(x), **kw))
    return b.dropout(added) if hasattr(b, "dropout") else added  # in 4.57 the dropout is part of the attention


def _vit_mlp(b: Any, x: Tensor) -> Tensor:
    x = b.layernorm_after(x)
    if hasattr(b, "intermediate"):  # 4.57: the forward of ``output`` would add the residual
        return b.output.dropout(b.output.dense(b.intermediate(x)))
    return b.dropout(b.mlp(x))


def _dino_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path(b.layer_scale1(_first(b.attention(b.norm1(x), **kw))))


def _dino_mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.layer_scale2(b.mlp(b.norm2(x))))


def _clip_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return _first(b.self_attn(hidden_states=b.layer_norm1(x), **kw))


def _clip_mlp(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.layer_norm2(x))


def _vjepa_attention(b: Any, x: Tensor, position_mask: Tensor | None = None, **kw: Any) -> Tensor:
    # the layer passes only the positions on; other keywords are refused if they are set
    return b.drop_path(_first(b.attention(b.norm1(x), position_mask=position_mask)))


def _vjepa_mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path(b.mlp(b.norm2(x)))


def _beit_attention(b: Any, x: Tensor, interpolate_pos_encoding: bool = False, **kw: Any) -> Tensor:
    # the bias is made for the image's own grid, so resizing is disabled: it could only resize to the number of kept tokens
    if hasattr(b, "intermediate"):  # 4.57: the attention makes the bias
        return b.drop_path(_scaled(b.lambda_1, _vit_attention(b, x, interpolate_pos_encoding=False, **kw)))
    (height, width), mask = kw.pop("resolution"), kw.pop("attention_mask", None)
    if b.relative_position_bias is not None:
        bias = b.relative_position_bias((height // b.patch_size, width // b.patch_size))
        mask = bias if mask is None else bias + mask
    return b.drop_path(b.lambda_1 * _vit_attention(b, x, attention_mask=mask, **kw))


def _beit_mlp(b: Any, x: Tensor) -> Tensor:
    if hasattr(b, "intermediate"):
        return b.drop_path(_scaled(b.lambda_2, b.output(b.intermediate(b.layernorm_after(x)))))
    return b.drop_path(b.lambda_2 * _vit_mlp(b, x))


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale * x


_MASK = "attention_mask"
_vit = BlockSpec(_vit_attention, _vit_mlp, own_mask=_MASK, after=("layernorm_after", "mlp", "intermediate", "output"))
_dino = BlockSpec(_dino_attention, _dino_mlp, own_mask=_MASK)
_clip = BlockSpec(_clip_attention, _clip_mlp, own_mask=_MASK, after=("layer_norm2", "mlp"))
for _path, _halves in {
    "vit.modeling_vit.ViTLayer": _vit,
    "deit.modeling_deit.DeiTLayer": _vit,
    "dinov2.modeling_dinov2.Dinov2Layer": _dino,
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _dino,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": replace(_dino, rope="position_embeddings"),
    "clip.modeling_clip.CLIPEncoderLayer": _clip,
    "siglip.modeling_siglip.SiglipEncoderLayer": _clip,
    "videomae.modeling_videomae.VideoMAELayer": replace(_vit, own_mask=None),
    # each layer makes its rotary tables from the indices of the patches, and counts the tokens if it is given none
    "vjepa2.modeling_vjepa2.VJEPA2Layer": BlockSpec(_vjepa_attention, _vjepa_mlp, origin="position_mask"),
    # opaque: reduced tokens must run through these halves, which do not resize the bias
    "beit.modeling_beit.BeitLayer": replace(
        _vit, attention=_beit_attention, mlp=_beit_mlp, relative=True, opaque_attention=True
    ),
}.items():
    register_block(f"transformers.models.{_path}", _halves)
