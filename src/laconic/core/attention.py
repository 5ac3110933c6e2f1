"""Read q, k and v of a model's attention, and add a bias to its logits, while the model's own code runs.

A `torch.overrides.TorchFunctionMode` intercepts the one `scaled_dot_product_attention` call of a block, with q and k exactly
as the model computed them (after q/k norm and rotary embedding). The model's attention is not rewritten and stays fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laconic.core.attention_bias import add_bias, narrowed
from laconic.core.gather import gather_rows
from laconic.core.running_calls import calls as running_calls
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionTap(TorchFunctionMode):
    """While active, records every `scaled_dot_product_attention` call in ``calls`` and adds ``bias`` to its logits.

    With ``weights`` [B, H, N, N] the call ignores q and k and returns weights @ v. If the model makes an attention mask for
    all its original tokens, ``rows`` [B, N] are the indices of the present tokens among those.
    """

    def __init__(
        self,
        calls: list[dict[str, Any]],
        bias: Tensor | None = None,
        weights: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.calls, self.bias, self.weights, self.rows = calls, bias, weights, rows
        self.depth = len(running_calls())

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or (self.depth and len(running_calls()) != self.depth):
            return func(*args, **(kwargs or {}))  # another function, or a forward that a hook of the block has started
        call = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        if self.rows is not None and call.get("attn_mask") is not None:
            call["attn_mask"] = narrowed(call["attn_mask"], self.rows)
        if self.bias is not None:
            call["attn_mask"] = add_bias(call.get("attn_mask"), self.bias.to(call["query"].dtype))
        self.calls.append(call)
        return self.answer(func, call)

    def answer(self, func: Any, call: dict[str, Any]) -> Tensor:
        """Return the output of the attention call."""
        if self.weights is None:
            return func(**call)
        return self.weights.to(call["value"].dtype) @ per_query(call["value"], self.weights.shape[1])


def per_query(heads: Float[Tensor, "B G N D"], count: int) -> Float[Tensor, "B H N D"]:
    """Repeat keys or values for each of ``count`` query heads (grouped queries share them)."""
    groups = count // heads.shape[1]
    return heads if groups == 1 else heads.repeat_interleave(groups, 1)


@dataclass(frozen=True)
class AttentionView:
    """One attention call, for methods to read. Every property is computed at access, in float32."""

    q: Float[Tensor, "B H N D"]
    k: Float[Tensor, "B G M D"]  # G key heads: equal to H, or a divisor of it (grouped queries)
    v: Float[Tensor, "B G M E"]
    mask: Tensor | None
    scale: float
    prefix: int
    has_cls: bool
    alive: Tensor | None = None  # [B, L] patch tokens that count as queries; None: all
    coarse: bool = False  # True if the keys are cells of a grid instead of tokens

    @classmethod
    def of(cls, calls: list[dict[str, Any]], tokens: Tokens, block: str, *, coarse: bool = False) -> AttentionView:
        """Return the view of the one call that ``block`` made on ``tokens``.

        Raises:
            RuntimeError: the block made no call, or several.
        """
        if len(calls) != 1:
            raise RuntimeError(
                f"{block} made {len(calls)} calls of scaled_dot_product_attention; laconic needs exactly one. Switch fused "
                "attention on (timm.layers.set_fused_attn(True) before creating the model)"
            )
        call = calls[0]
        q, k, v, scale, mask = call["query"], call["key"], call["value"], call.get("scale"), call.get("attn_mask")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 3 else mask  # one for the whole batch
        return cls(q, k, v, mask, scale, tokens.prefix, tokens.has_cls, tokens.keep_mask, coarse)

    @property
    def cls(self) -> Float[Tensor, "B L"]:
        """Attention of the class token to each patch token, mean over heads, softmax over all tokens. O(N C), not O(N^2).

        Raises:
            LookupError: the model has no class token.
        """
        return self.cls_heads.mean(1)

    @property
    def cls_heads(self) -> Float[Tensor, "B H L"]:
        """Attention of the class token to each patch token, for each head.

        Raises:
            LookupError: the model has no class token.
        """
        if not self.has_cls:
            raise LookupError(
                "this backbone has no class token, so there is no class attention to score with; pass "
                "score='mean-query' (the attention of the mean patch query), or use a method that does not score by class "
                "attention (dtps, dynamicvit, tome)"
            )
        return self._row_heads(self.q[:, :, 0], None if self.mask is None else self.mask[:, :, 0])

    @property
    def value_lengths(self) -> Float[Tensor, "B H L"]:
        """L2 norm of each patch token's value, for each head."""
        return torch.linalg.vector_norm(self._per_query(self.v)[:, :, self.prefix :].float(), dim=-1)

    @property
    def mean_query(self) -> Float[Tensor, "B L"]:
        """Attention of the mean patch query, mean over heads: a substitute for class attention in models without one."""
        queries = self.q[:, :, self.prefix :].float()
        if self.mask is None or self.mask.dtype == torch.bool or self.mask.shape[2] == 1:
            row = None if self.mask is None else self.mask[:, :, 0]
        else:  # a bias for each pair of tokens: average it over the same queries
            row = self._mean_alive(self.mask[:, :, self.prefix :].float())
        return self._row_heads(self._mean_alive(queries), row).mean(1)

    @property
    def keys(self) -> Float[Tensor, "B L D"]:
        """Key of each patch token, mean over heads."""
        return self._of_tokens(self.k)[:, :, self.prefix :].float().mean(1)

    @property
    def matrix(self) -> Float[Tensor, "B H N N"]:
        """All attention weights, with prefix tokens among queries and keys. O(H N^2): for methods defined by this matrix."""
        logits = self.q.float() @ self._per_query(self.k).float().transpose(-2, -1) * self.scale
        return (logits if self.mask is None else add_bias(self.mask, logits)).softmax(-1)

    @property
    def received(self) -> Float[Tensor, "B L"]:
        """Attention that each patch token receives, mean over heads and over all queries. Needs the whole matrix."""
        sent = self.matrix.mean(1)
        if self.alive is None:
            return sent.mean(1)[:, self.prefix :]
        count = F.pad(self.alive.detach(), (self.prefix, 0), value=1.0).unsqueeze(2)
        return ((sent * count).sum(1) / count.sum(1))[:, self.prefix :]

    @property
    def values(self) -> Float[Tensor, "B L E"]:
        """Value of each patch token, heads concatenated."""
        return self._per_query(self.v)[:, :, self.prefix :].float().transpose(1, 2).flatten(2)

    def rows(self, index: Int[Tensor, "B M"]) -> Float[Tensor, "B M L"]:
        """Return the attention of the patch queries ``index`` to all patch tokens, mean over heads: M rows of the matrix."""
        q = gather_rows(self.q.transpose(1, 2), index + self.prefix).transpose(1, 2).float()
        logits = q @ self._per_query(self.k).float().transpose(-2, -1) * self.scale
        if self.mask is not None:
            mask = self.mask.expand(q.shape[0], -1, -1, -1)
            rows = gather_rows(mask.transpose(1, 2), index + self.prefix).transpose(1, 2) if mask.shape[2] > 1 else mask
            logits = add_bias(rows, logits)
        return logits.softmax(-1).mean(1)[..., self.prefix :]

    def _of_tokens(self, x: Tensor) -> Tensor:
        if self.coarse:
            raise LookupError(
                f"the {x.shape[2]} keys of this block are cells of its grid, not its {self.q.shape[2]} tokens, so there is no "
                "attention towards tokens to score with; use a method that scores by features (dtps, dynamicvit)"
            )
        return x

    def _per_query(self, x: Tensor) -> Tensor:
        return per_query(self._of_tokens(x), self.q.shape[1])

    def _mean_alive(self, of_queries: Tensor) -> Tensor:
        """Return the mean of [B, H, L, ...] over the visible patch queries."""
        if self.alive is None:
            return of_queries.mean(2)
        count = self.alive.unsqueeze(1).unsqueeze(3).detach()
        return (of_queries * count).sum(2) / count.sum(2).clamp_min(1e-6)

    def _row_heads(self, q: Tensor, row: Tensor | None) -> Tensor:
        """Return the attention of one query [B, H, D] for each head; ``row`` [b, h, N] is a mask or bias on its logits."""
        # multiply and sum reads the strided keys once; a matmul would copy them first
        logits = (self._per_query(self.k).float() * (q.float() * self.scale).unsqueeze(2)).sum(-1)
        return (logits if row is None else add_bias(row, logits)).softmax(-1)[..., self.prefix :]
