"""How much work a host's layers do, in closed form: from the shapes of its modules and how many tokens pass through each.

Work is a `Counter` of multiply-adds (or elements) by kind; which kinds make a cost is a convention (`laconic.analysis.macs`):

* ``matmul``: multiply-adds of matrix products and convolutions.
* ``pairwise``: multiply-adds of a reducer's similarity or distance matrices that profilers of the time did not see (BAT).
* ``layernorm``, ``batchnorm``: elements that pass through one. ``scores``: attention logits that are scaled.
* ``elementwise``: elements a reducer multiplies by a weight. ``head_mean``: attention weights averaged over heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from laconic.core.attention import AttentionTap
from laconic.core.backbone import ModelSpec, StageSpec, block_spec

if TYPE_CHECKING:
    from laconic.analysis.input_size import InputSize

Work = Counter[str]
KINDS = ("matmul", "pairwise", "layernorm", "batchnorm", "scores", "elementwise", "head_mean")
COUNTED = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)


def layers(module: nn.Module, rows: int | Callable[[str], int]) -> Work:
    """The layers of ``module`` on so many rows (cells that a convolution makes), or as many as the name of the layer says."""
    work = Work()
    for name, layer in module.named_modules():
        count = rows(name) if callable(rows) else rows
        if isinstance(layer, nn.Linear | nn.Conv2d):
            work["matmul"] += count * layer.weight.numel()
        elif getattr(layer, "in_proj_weight", None) is not None:
            work["matmul"] += count * layer.in_proj_weight.numel()  # its output projection is a layer of its own
        elif isinstance(layer, nn.LayerNorm):
            work["layernorm"] += count * prod(layer.normalized_shape)
        elif isinstance(layer, nn.BatchNorm2d):
            work["batchnorm"] += count * layer.num_features
    return work


def attention(attn: Any, queries: int, keys: int) -> Work:
    """The two matrix products of an attention: logits, and the weighted sum of values."""
    heads, head = heads_of(attn), getattr(attn, "head_dim", getattr(attn, "attention_head_size", None))
    width = attn.proj.in_features if head is None else heads * head  # EvaAttention says nothing of it in older timm
    return Work(matmul=2 * queries * keys * width, scores=queries * keys * heads)


def heads_of(attn: Any) -> int:
    """The query heads of an attention module."""
    count: int = attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads
    return count


def attention_in(block: nn.Module) -> Any:
    """The attention of a block: ``attn``, or the last module in it that has heads (parallel blocks are their own)."""
    if hasattr(block, "attn"):
        return block.attn
    return [m for m in block.modules() if hasattr(m, "num_heads") or hasattr(m, "num_attention_heads")][-1]


def block(module: Any, at_attention: int, at_mlp: int, shape: StageSpec | None = None) -> Work:
    """One block of a stage on so many tokens, prefix tokens among them; a block may have a method ``work`` that knows."""
    if hasattr(module, "work"):
        return Work(module.work(at_attention, at_mlp, shape))
    attn, halves = attention_in(module), block_spec(module)
    heads = heads_of(attn)
    per_head = {"q_norm": heads, "k_norm": getattr(attn, "num_kv_heads", heads)}

    def rows(name: str) -> int:
        fixed = halves.rows(module, name)
        if fixed is not None:
            return fixed
        tokens = at_mlp if name.partition(".")[0] in halves.after else at_attention
        return tokens * per_head.get(name.rpartition(".")[2], 1)

    return layers(module, rows) + attention(attn, at_attention, at_attention)


def pooling(pool: Any, tokens: int) -> Work:
    """An attention pool over so many tokens: one with latent queries (SigLIP's), or self-attention without weights."""
    if isinstance(getattr(pool, "attention", None), nn.MultiheadAttention):  # transformers': one probe
        attn = pool.attention
        return layers(pool, 1) + Work(matmul=2 * (tokens - 1) * attn.embed_dim**2) + attention(attn, 1, tokens)
    latents = getattr(pool, "latent_len", None)
    if latents is None:
        return layers(pool, tokens) + attention(pool, tokens, tokens)
    wide = {"kv": tokens, "k_norm": tokens * pool.num_heads, "q_norm": latents * pool.num_heads}
    return layers(pool, lambda name: wide.get(name, latents)) + attention(pool, latents, tokens)


def stem(model: Any, host: ModelSpec, image: Tensor | None = None) -> Work:
    """The patch embedding of one image (None: of the model's own size): run on the meta device, where nothing is computed."""
    work, embed = Work(), host.patch_embed(model)

    def note(layer: Any, _: Any, out: Tensor) -> None:
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            work["layernorm" if isinstance(layer, nn.LayerNorm) else "batchnorm"] += out.numel()
        else:
            work["matmul"] += out.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(note) for m in embed.modules() if isinstance(m, COUNTED)]
    state = {name: t.to("meta") for name, t in [*embed.named_parameters(), *embed.named_buffers()]}
    calls: list[dict[str, Any]] = []  # PS-ViT's has attention in it
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
    """All but the blocks, for one image: ``before`` tokens enter them and ``after`` leave, prefix tokens among them.

    Raises:
        ValueError: the model has layers of its own, and how often they run is not known.
    """
    if hasattr(model, "work_of_ends"):
        grids = () if size is None or size.image is None else ([shape.grid for shape in size.shapes],)
        return Work(model.work_of_ends(before, after, *grids))
    prefix, _ = host.prefix(model)
    pool, (kind, with_prefix) = getattr(model, "attn_pool", None), host.pooling(model)
    pooled = after if kind == "none" else 1
    rows = {"norm_pre": before, "norm": after, "fc_norm": pooled, "head": pooled, "head_dist": pooled}
    rows["aux_head"] = after - prefix if kind == "max" else 0  # LV-ViT's, on every patch token
    if host.rows is not None:
        rows = host.rows(model, before, after)
    work, first, embed = stem(model, host, None if size is None else size.image), host.blocks(model)[0], host.patch_embed(model)
    work["matmul"] += host.extra_macs(model, before, after)
    for name, child in model.named_children():
        if name in rows:
            work += layers(child, rows[name])
        elif child is pool or (name == "head" and kind == "map"):
            work += pooling(child, after if with_prefix else after - prefix)
        elif any(module is first for module in child.modules()):  # the blocks, and what there is beside them
            beside = [(f"{name}.{part}", layer) for part, layer in child.named_children()]
            work += sum((layers(layer, rows[part]) for part, layer in beside if part in rows), Work())
        elif child is embed or name == "laconic":
            continue
        elif any(isinstance(m, COUNTED) for m in child.modules()):
            raise ValueError(
                f"{type(model).__name__}.{name} is no part of the vision transformers laconic knows, so how many tokens pass "
                "through it is not known; count the work of this model yourself (torch.utils.flop_counter)"
            )
    return work
