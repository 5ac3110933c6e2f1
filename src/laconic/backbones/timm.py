"""timm's VisionTransformer (DeiT, DeiT-III, DINOv2, AugReg, CLIP, SigLIP) and Eva (EVA-02, DINOv3, PE)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.backbone import AttentionSteps, BlockSpec, ModelSpec, path_of, register_block, register_host, unhooked


def _gamma(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _block_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path1(b.ls1(b.attn(b.norm1(x), **kw)))


def _block_mlp(b: Any, x: Tensor) -> Tensor:
    parts = b._modules  # an attribute would cost a call of Module.__getattr__
    return parts["drop_path2"](parts["ls2"](parts["mlp"](parts["norm2"](x))))


def _post_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path1(b.norm1(b.attn(x, **kw)))


def _post_mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path2(b.norm2(b.mlp(x)))


def _eva_attention(b: Any, x: Tensor, **kw: Any) -> Tensor:
    return b.drop_path1(_gamma(b.gamma_1, b.attn(b.norm1(x), **kw)))


def _eva_mlp(b: Any, x: Tensor) -> Tensor:
    return b.drop_path2(_gamma(b.gamma_2, b.mlp(b.norm2(x))))


# the class path depends on timm's version
_ATTENTION = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


def _known(b: Any) -> bool:
    """Return True if the attention is timm's own with a plain qkv layer: no adapter, quantised weights, hooks or overrides."""
    attn = b._modules["attn"]  # here and below: an attribute would cost a call of Module.__getattr__
    qkv = attn._modules.get("qkv")
    if type(qkv) is not nn.Linear or not attn.fused_attn:
        return False
    if type(qkv._parameters.get("weight")) is not nn.Parameter:  # quantised, sharded, or in a DataParallel replica
        return False
    return path_of(type(attn)) in _ATTENTION and unhooked(attn, qkv) and attn._modules.get("gate") is None


def _heads_of(attn: Any, out: Tensor) -> Tensor:
    return out.reshape(out.shape[0], out.shape[1], -1, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)


def _queries(b: Any, h: Tensor) -> Tensor:
    attn = b._modules["attn"]
    qkv = attn._modules["qkv"]._parameters
    weight, bias = qkv["weight"], qkv["bias"]
    width = weight.shape[0] // 3
    out = F.linear(h, weight[:width], None if bias is None else bias[:width])
    queries: Tensor = attn._modules["q_norm"](_heads_of(attn, out)[0])
    return queries


def _keys_values(b: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    attn = b._modules["attn"]
    qkv = attn._modules["qkv"]._parameters
    weight, bias = qkv["weight"], qkv["bias"]
    width = weight.shape[0] // 3
    k, v = _heads_of(attn, F.linear(h, weight[width:], None if bias is None else bias[width:])).unbind(0)
    return attn._modules["k_norm"](k), v


def _project(b: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = b._modules["attn"]
    qkv = attn._modules["qkv"]._parameters
    q, k, v = _heads_of(attn, F.linear(h, qkv["weight"], qkv["bias"])).unbind(0)
    return attn._modules["q_norm"](q), attn._modules["k_norm"](k), v


def _added(b: Any, heads: Tensor) -> Tensor:
    attn = b._modules["attn"]
    inside, around = attn._modules, b._modules
    x, norm = heads.transpose(1, 2).flatten(2), inside.get("norm")
    x = x if norm is None else norm(x)
    return around["drop_path1"](around["ls1"](inside["proj_drop"](inside["proj"](x))))


def _norm(b: Any, x: Tensor) -> Tensor:
    h: Tensor = b._modules["norm1"](x)
    return h


_steps = AttentionSteps(_known, _norm, _queries, _keys_values, _project, _added)
register_block("timm.models.vision_transformer.Block", BlockSpec(_block_attention, _block_mlp, steps=_steps))
register_block("timm.models.vision_transformer.ResPostBlock", BlockSpec(_post_attention, _post_mlp))
register_block("timm.models.vision_transformer.ParallelScalingBlock", BlockSpec())  # attention and MLP in parallel
register_block("timm.models.eva.EvaBlock", BlockSpec(_eva_attention, _eva_mlp, rope="rope"))
register_block("timm.models.eva.EvaBlockPostNorm", BlockSpec(_post_attention, _post_mlp, rope="rope"))


def _prefix(m: Any) -> tuple[int, bool]:
    return m.num_prefix_tokens, getattr(m, "cls_token", None) is not None


def _grid(m: Any) -> tuple[int, int]:
    size = getattr(m.patch_embed, "grid_size", None)
    if size is None:  # flexible input: the grid of the example
        height, width = m.patch_embed.feat_ratio(as_scalar=False)
        _, _, h, w = _example(m).shape
        return h // height, w // width
    return tuple(size)


def _positions(m: Any) -> Tensor | None:
    table = getattr(m, "pos_embed", None)
    patches = _grid(m)[0] * _grid(m)[1]
    return None if table is None or table.shape[1] < patches else table[0, -patches:]


def _heads(m: Any) -> int:
    block = m.blocks[0]
    return block.attn.num_heads if hasattr(block, "attn") else block.num_heads


def _example(m: Any) -> Tensor:
    reference = next(m.parameters())
    cfg = getattr(m, "pretrained_cfg", None) or {}
    channels = next((c.in_channels for c in m.patch_embed.modules() if isinstance(c, nn.Conv2d)), 3)
    size = getattr(m.patch_embed, "img_size", None) or tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(reference.device, reference.dtype)


def _pooling(m: Any) -> tuple[str, bool]:
    pool = getattr(m, "attn_pool", None)
    if pool is None:
        return m.global_pool or "none", getattr(m, "pool_include_prefix", False)
    kind = "map" if type(pool).__name__ == "AttentionPoolLatent" else type(pool).__name__
    return kind, getattr(m, "pool_include_prefix", True)  # Eva passes all its tokens to the attention pool


def _grid_of(m: Any, size: tuple[int, ...]) -> tuple[int, int] | None:
    embed = m.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        return tuple(embed.dynamic_feat_size(size))
    return getattr(embed, "grid_size", None)


def _unsupported_reason(m: Any) -> str | None:
    if not isinstance(getattr(m, "patch_drop", None), nn.Identity | None):
        return "its patch dropout already removes patches in training; create it with patch_drop_rate=0"
    if getattr(getattr(m, "attn_pool", None), "pos_embed", None) is not None:
        return "its attention pool adds a position embedding for the full number of tokens"
    return None


_common = ModelSpec(
    path="timm.models.vision_transformer.VisionTransformer",
    blocks=lambda m: list(m.blocks),
    prefix=_prefix,
    positions=_positions,
    grid=_grid,
    dim=lambda m: m.embed_dim,
    heads=_heads,
    example=_example,
    pooling=_pooling,
    unsupported_reason=_unsupported_reason,
    grid_of=_grid_of,
)
for _path in (_common.path, "timm.models.eva.Eva"):
    register_host(replace(_common, path=_path, head_reads_prefix_only=("forward", "forward_features", "forward_head", "pool")))
