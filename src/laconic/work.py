"""How much work a host's layers do, in closed form: from the shapes of its modules and how many tokens pass through each.

Work is a `Counter` of multiply-adds (or elements) by kind; which kinds make a cost is a convention (`laconic.cost`):

* ``matmul``: multiply-adds of matrix products and convolutions.
* ``pairwise``: multiply-adds of a reducer's similarity or distance matrices that profilers of the time did not see (BAT).
* ``layernorm``: elements that pass through a LayerNorm. ``scores``: attention logits that are scaled.
* ``elementwise``: elements a reducer multiplies by a weight. ``head_mean``: attention weights averaged over heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from laconic.hosts import Host

Work = Counter[str]
KINDS = ("matmul", "pairwise", "layernorm", "scores", "elementwise", "head_mean")
COUNTED = (nn.Linear, nn.Conv2d, nn.LayerNorm)
AFTER_ATTENTION = ("mlp", "norm2")  # the parts of a block that see the tokens a method leaves between attention and MLP


def layers(module: nn.Module, rows: int | Callable[[str], int]) -> Work:
    """The Linear and LayerNorm layers of ``module``, on so many rows each, or as many as the name of the layer says."""
    work = Work()
    for name, layer in module.named_modules():
        count = rows(name) if callable(rows) else rows
        if isinstance(layer, nn.Linear):
            work["matmul"] += count * layer.in_features * layer.out_features
        elif isinstance(layer, nn.LayerNorm):
            work["layernorm"] += count * prod(layer.normalized_shape)
    return work


def attention(attn: Any, queries: int, keys: int) -> Work:
    """The two matrix products of an attention: logits, and the weighted sum of values."""
    # EvaAttention says nothing of its head width in older timm
    width = attn.num_heads * attn.head_dim if hasattr(attn, "head_dim") else attn.proj.in_features
    return Work(matmul=2 * queries * keys * width, scores=queries * keys * attn.num_heads)


def block(module: nn.Module, at_attention: int, at_mlp: int) -> Work:
    """One block on so many tokens, prefix tokens among them."""
    attn: Any = getattr(module, "attn", module)  # parallel blocks are their own attention
    per_head = {"q_norm": attn.num_heads, "k_norm": getattr(attn, "num_kv_heads", attn.num_heads)}

    def rows(name: str) -> int:
        tokens = at_mlp if name.partition(".")[0] in AFTER_ATTENTION else at_attention
        return tokens * per_head.get(name.rpartition(".")[2], 1)

    return layers(module, rows) + attention(attn, at_attention, at_attention)


def pooling(pool: Any, tokens: int) -> Work:
    """An attention pool over so many tokens: one with latent queries (SigLIP), or self-attention without weights."""
    latents = getattr(pool, "latent_len", None)
    if latents is None:
        return layers(pool, tokens) + attention(pool, tokens, tokens)
    wide = {"kv": tokens, "k_norm": tokens * pool.num_heads, "q_norm": latents * pool.num_heads}
    return layers(pool, lambda name: wide.get(name, latents)) + attention(pool, latents, tokens)


def stem(model: Any, host: Host) -> Work:
    """The patch embedding of one image, whatever is in it: run on the meta device, where nothing is computed."""
    work, embed = Work(), model.patch_embed

    def note(layer: Any, _: Any, out: Tensor) -> None:
        if isinstance(layer, nn.LayerNorm):
            work["layernorm"] += out.numel()
        else:
            work["matmul"] += out.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(note) for m in embed.modules() if isinstance(m, COUNTED)]
    state = {name: t.to("meta") for name, t in [*embed.named_parameters(), *embed.named_buffers()]}
    try:
        with torch.no_grad():
            torch.func.functional_call(embed, state, (host.example(model).to("meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    return work


def ends(model: Any, host: Host, before: int, after: int) -> Work:
    """All but the blocks, for one image: ``before`` tokens enter them and ``after`` leave, prefix tokens among them.

    Raises:
        ValueError: the model has layers of its own, and how often they run is not known.
    """
    prefix, _ = host.prefix(model)
    pool, (kind, with_prefix) = getattr(model, "attn_pool", None), host.pooling(model)
    pooled = after if kind == "none" else 1
    rows = {"norm_pre": before, "norm": after, "fc_norm": pooled, "head": pooled, "head_dist": pooled}
    work = stem(model, host)
    for name, child in model.named_children():
        if name in rows:
            work += layers(child, rows[name])
        elif child is pool:
            work += pooling(pool, after if with_prefix else after - prefix)
        elif name not in ("patch_embed", "blocks", "laconic") and any(isinstance(m, COUNTED) for m in child.modules()):
            raise ValueError(
                f"{type(model).__name__}.{name} is no part of the vision transformers laconic knows, so how many tokens pass "
                "through it is not known; count the work of this model yourself (torch.utils.flop_counter)"
            )
    return work
