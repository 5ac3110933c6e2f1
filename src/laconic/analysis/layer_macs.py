"""The work of a backbone's layers in closed form, from the shapes of its modules and the token count at each.

Work is a `Counter` of multiply-adds (or elements) by kind; a convention weighs the kinds (`laconic.analysis.macs`):

* ``matmul``: multiply-adds of matrix products and convolutions.
* ``pairwise``: multiply-adds of a reducer's similarity or distance matrices that the paper's profiler did not count (BAT).
* ``layernorm``, ``batchnorm``: elements normalized by one. ``scores``: attention logits that are scaled.
* ``elementwise``: elements that a reducer multiplies by a weight. ``head_mean``: attention weights averaged over heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.core.attention import AttentionTap
from laconic.core.backbone import ModelSpec, Rows, StageSpec, block_spec

if TYPE_CHECKING:
    from laconic.analysis.input_size import InputSize

Work = Counter[str]
KINDS = ("matmul", "pairwise", "layernorm", "batchnorm", "scores", "elementwise", "head_mean")
COUNTED = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.BatchNorm2d)


def layers(module: nn.Module, rows: int | Callable[[str], int]) -> Work:
    """Return the work of the layers in ``module`` on ``rows`` rows (output cells of a convolution), or ``rows(name)`` rows."""
    work = Work()
    for name, layer in module.named_modules():
        count = rows(name) if callable(rows) else rows
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            work["matmul"] += count * layer.weight.numel()
        elif getattr(layer, "in_proj_weight", None) is not None:
            work["matmul"] += count * layer.in_proj_weight.numel()  # its output projection is a separate layer
        elif isinstance(layer, nn.LayerNorm):
            work["layernorm"] += count * prod(layer.normalized_shape)
        elif isinstance(layer, nn.BatchNorm2d):
            work["batchnorm"] += count * layer.num_features
    return work


def attention(attn: Any, queries: int, keys: int) -> Work:
    """Return the work of the two matrix products of an attention: logits, and the weighted sum of values."""
    heads, head = heads_of(attn), getattr(attn, "head_dim", getattr(attn, "attention_head_size", None))
    width = attn.proj.in_features if head is None else heads * head  # EvaAttention of older timm has no head_dim
    return Work(matmul=2 * queries * keys * width, scores=queries * keys * heads)


def heads_of(attn: Any) -> int:
    """Return the number of query heads of an attention module."""
    count: int = attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
    return count


def attention_in(block: nn.Module) -> Any:
    """Return a block's attention: ``attn``, or the last module with heads (a parallel block is its own attention)."""
    if hasattr(block, "attn"):
        return block.attn
    return [m for m in block.modules() if hasattr(m, "num_heads") or hasattr(m, "num_attention_heads")][-1]


def block(module: Any, at_attention: int, at_mlp: int, shape: StageSpec | None = None, keys: int | None = None) -> Work:
    """Return the work of a block for its token counts, prefix tokens included; the block's own method ``work`` comes first.

    ``keys`` is the number of tokens that are attended to; by default, those at the attention.
    """
    if hasattr(module, "work"):
        return Work(module.work(at_attention, at_mlp, shape))
    attn, spec = attention_in(module), block_spec(module)
    heads = heads_of(attn)
    per_head = {"q_norm": heads, "k_norm": getattr(attn, "num_kv_heads", heads)}

    def rows(name: str) -> int:
        fixed = spec.rows(module, name)
        if fixed is not None:
            return fixed
        tokens = at_mlp if name.partition(".")[0] in spec.after else at_attention
        return tokens * per_head.get(name.rpartition(".")[2], 1)

    return layers(module, rows) + attention(attn, at_attention, at_attention if keys is None else keys)


def pooling(pool: Any, tokens: int) -> Work:
    """Return the work of an attention pool over ``tokens``: with latent queries (SigLIP), or self-attention of all tokens."""
    if isinstance(getattr(pool, "attention", None), nn.MultiheadAttention):  # transformers' pool has one probe
        attn = pool.attention
        return layers(pool, 1) + Work(matmul=2 * (tokens - 1) * attn.embed_dim**2) + attention(attn, 1, tokens)
    latents = getattr(pool, "latent_len", None)
    if latents is None:
        return layers(pool, tokens) + attention(pool, tokens, tokens)
    wide = {"kv": tokens, "k_norm": tokens * pool.num_heads, "q_norm": latents * pool.num_heads}
    return layers(pool, lambda name: wide.get(name, latents)) + attention(pool, latents, tokens)


def stem(model: Any, host: ModelSpec, image: Tensor | None = None) -> Work:
    """Return the work of the patch embedding for one image (None: of the model's own size), counted on the meta device."""
    work, embed = Work(), host.patch_embed(model)

    def count(layer: Any, _: Any, out: Tensor) -> None:
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            work["layernorm" if isinstance(layer, nn.LayerNorm) else "batchnorm"] += out.numel()
        else:
            work["matmul"] += out.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in embed.modules() if isinstance(m, COUNTED)]
    state = {name: t.to("meta") for name, t in [*embed.named_parameters(), *embed.named_buffers()]}
    calls: list[dict[str, Any]] = []  # PS-ViT's patch embedding has attention in it
    try:
        with torch.no_grad(), AttentionTap(calls):
            torch.func.functional_call(embed, state, ((host.example(model) if image is None else image).to("meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    for call in calls:
        pairs = call["query"].shape[:-1].numel() * call["key"].shape[-2]
        work.update(matmul=pairs * (call["query"].shape[-1] + call["value"].shape[-1]), scores=pairs)
    return work


def ends(model: Any, host: ModelSpec, before: int, after: int, size: InputSize | None = None) -> Work:
    """Return the work outside the blocks for one image.

    ``before`` and ``after``: tokens that enter the first block and that the last block returns, prefix tokens included.

    Raises:
        ValueError: the model has additional layers whose token count is unknown.
    """
    if hasattr(model, "work_of_ends"):
        grids = () if size is None or size.image is None else ([shape.grid for shape in size.shapes],)
        return Work(model.work_of_ends(before, after, *grids))
    prefix, _ = host.prefix(model)
    pool, (kind, with_prefix) = getattr(model, "attn_pool", None), host.pooling(model)
    pooled = after if kind == "none" else 1
    rows: Mapping[str, Rows] = {"norm_pre": before, "norm": after, "fc_norm": pooled, "head": pooled, "head_dist": pooled}
    rows = {**rows, "aux_head": after - prefix if kind == "max" else 0}  # LV-ViT's, on every patch token
    if host.rows is not None:
        rows = host.rows(model, before, after)
    work, first, embed = stem(model, host, None if size is None else size.image), host.blocks(model)[0], host.patch_embed(model)
    work["matmul"] += host.extra_macs(model, before, after)
    for name, child in model.named_children():
        if name in rows:
            work += layers(child, rows[name])
        elif child is pool or (name == "head" and kind == "map"):
            work += pooling(child, after if with_prefix else after - prefix)
        elif any(module is first for module in child.modules()):  # the module with the blocks, and other layers in it
            inner = [(f"{name}.{part}", layer) for part, layer in child.named_modules()]
            work += sum((layers(layer, rows[part]) for part, layer in inner if part in rows), Work())
        elif child is embed or name == "laconic":
            continue
        elif any(isinstance(m, COUNTED) for m in child.modules()):
            raise ValueError(
                f"{type(model).__name__}.{name} is not part of the vision transformers that laconic knows, so the number of "
                "tokens at this layer is unknown; count the work of this model yourself (torch.utils.flop_counter)"
            )
    return work
