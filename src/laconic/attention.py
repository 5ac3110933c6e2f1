"""The seam with the host's attention: read q, k, v; add a bias. The host's own code, fused attention included, runs on.

A `torch.overrides.TorchFunctionMode` sees the one `scaled_dot_product_attention` call a block makes, with q and k exactly
as the host computed them (after q/k norm and rotary embedding). Nothing of the host's attention is rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from laconic.rows import take
from laconic.shapes import Float, Int
from laconic.tokens import Tokens

# What a softly removed token still weighs, so that the logarithm and its gradient stay finite. It must be far below any
# ratio of two attention weights, or an outlier shines through; float16 cannot carry the gradient of so little.
SOFT_FLOOR = 1e-30
SOFT_FLOOR_HALF = 1e-8
# The gradient towards a removed token is its attention weight by the sum of all others', which has no bound: 1 / eps, as in
# DynamicViT's code, is where it stops here.
SOFT_SLOPE = 1e6
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Watch(TorchFunctionMode):
    """While active, notes every `scaled_dot_product_attention` call in ``calls`` and adds ``bias`` to its logits.

    With ``weights`` [B, H, N, N] the call does not look at q and k at all: its answer is weights @ v.
    """

    def __init__(self, calls: list[dict[str, Any]], bias: Tensor | None = None, weights: Tensor | None = None) -> None:
        super().__init__()
        self.calls, self.bias, self.weights = calls, bias, weights

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        if self.bias is not None:
            call["attn_mask"] = add_bias(call.get("attn_mask"), self.bias.to(call["query"].dtype))
        self.calls.append(call)
        return self.answer(func, call)

    def answer(self, func: Any, call: dict[str, Any]) -> Tensor:
        """The attention itself."""
        if self.weights is None:
            return func(**call)
        return self.weights.to(call["value"].dtype) @ per_query(call["value"], self.weights.shape[1])


def per_query(heads: Float[Tensor, "B G N D"], count: int) -> Float[Tensor, "B H N D"]:
    """Keys or values once for each of ``count`` query heads (grouped queries share theirs)."""
    groups = count // heads.shape[1]
    return heads if groups == 1 else heads.repeat_interleave(groups, 1)


class SoftLog(torch.autograd.Function):
    """log(x (1 - floor) + floor) for x in [0, 1], with a gradient of at most `SOFT_SLOPE`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        lifted = x * (1 - floor) + floor
        ctx.save_for_backward(lifted)
        return lifted.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (lifted,) = ctx.saved_tensors
        return (gradient / lifted).clamp(-SOFT_SLOPE, SOFT_SLOPE), None


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An attention mask (boolean or additive) with ``bias`` on top."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else mask + bias


def bias_of(tokens: Tokens) -> Tensor | None:
    """What the gates of the tokens add to attention logits: [B, 1, 1, N], or [B, 1, N, N] with soft decisions, or None.

    Proportional attention adds log(size) for the key (ToMe). A softly removed token is hidden from all but itself:
    M_ij = alive_j + (1 - alive_j) [i = j] multiplies exp(logit) (DynamicViT, eq. 11), that is log M_ij is added.
    """
    bias = None
    if tokens.gate is not None:
        bias = F.pad(tokens.gate.log(), (tokens.prefix, 0)).unsqueeze(1).unsqueeze(1)
    alive = shown_of(tokens)
    if alive is not None:
        itself = torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
        kind = tokens.x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.x.dtype
        floor = SOFT_FLOOR_HALF if dtype == torch.float16 else SOFT_FLOOR
        soft = SoftLog.apply(torch.where(itself, 1.0, alive.unsqueeze(1)), floor).unsqueeze(1)
        bias = soft if bias is None else bias + soft
    return bias


def shown_of(tokens: Tokens) -> Tensor | None:
    """Whether others see each token, prefix tokens among them: [B, N] as a factor, or None where all are seen."""
    if tokens.alive is None and tokens.shown is None:
        return None
    patches = tokens.there
    if tokens.shown is None:
        return F.pad(patches, (tokens.prefix, 0), value=1.0)
    return torch.cat([tokens.shown.to(patches.dtype), patches], 1)


@dataclass(frozen=True)
class Seen:
    """One attention call as a method may look at it. Every view is computed when it is asked for, in float32."""

    q: Float[Tensor, "B H N D"]
    k: Float[Tensor, "B G N D"]  # G key heads: as many as H, or a divisor of it (grouped queries)
    v: Float[Tensor, "B G N E"]
    mask: Tensor | None
    scale: float
    prefix: int
    has_cls: bool
    alive: Tensor | None = None  # [B, L] patch tokens that count as queries; None: all

    @classmethod
    def of(cls, calls: list[dict[str, Any]], tokens: Tokens, block: str) -> Seen:
        """The view of the one call that ``block`` made on ``tokens``.

        Raises:
            RuntimeError: it made none, or several.
        """
        if len(calls) != 1:
            raise RuntimeError(
                f"{block} made {len(calls)} calls of scaled_dot_product_attention where laconic needs exactly one; switch "
                "fused attention on (timm.layers.set_fused_attn(True) before creating the model)"
            )
        q, k, v = (calls[0][name] for name in ("query", "key", "value"))
        scale = calls[0].get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cls(q, k, v, calls[0].get("attn_mask"), scale, tokens.prefix, tokens.has_cls, tokens.alive)

    @property
    def cls(self) -> Float[Tensor, "B L"]:
        """Attention of the class token to each patch token, mean over heads, softmax over all tokens. O(N C), never N x N.

        Raises:
            LookupError: the host has no class token.
        """
        return self.cls_heads.mean(1)

    @property
    def cls_heads(self) -> Float[Tensor, "B H L"]:
        """Attention of the class token to each patch token, of each head.

        Raises:
            LookupError: the host has no class token.
        """
        if not self.has_cls:
            raise LookupError(
                "this backbone has no class token, so there is no class attention to score with; pass "
                "score='mean-query' (the attention of the mean patch query), or take a method with a score of its own "
                "(dtps, dynamicvit, tome)"
            )
        return self._row_heads(self.q[:, :, 0])

    @property
    def value_lengths(self) -> Float[Tensor, "B H L"]:
        """Length of each patch token's value, of each head."""
        return torch.linalg.vector_norm(per_query(self.v, self.q.shape[1])[:, :, self.prefix :].float(), dim=-1)

    @property
    def mean_query(self) -> Float[Tensor, "B L"]:
        """Attention of the mean patch query, mean over heads: a stand-in where there is no class token."""
        queries = self.q[:, :, self.prefix :].float()
        if self.alive is None:
            return self._row_heads(queries.mean(2), first=False).mean(1)
        count = self.alive.unsqueeze(1).unsqueeze(3).detach()
        mean = (queries * count).sum(2) / count.sum(2).clamp_min(1e-6)
        return self._row_heads(mean, first=False).mean(1)

    @property
    def keys(self) -> Float[Tensor, "B L D"]:
        """Key of each patch token, mean over heads."""
        return self.k[:, :, self.prefix :].float().mean(1)

    @property
    def matrix(self) -> Float[Tensor, "B H N N"]:
        """All attention weights, prefix tokens among queries and keys. O(H N^2): for methods that are defined by it."""
        logits = self.q.float() @ self._keys_per_query().float().transpose(-2, -1) * self.scale
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
        """Value of each patch token, heads side by side."""
        return per_query(self.v, self.q.shape[1])[:, :, self.prefix :].float().transpose(1, 2).flatten(2)

    def rows(self, index: Int[Tensor, "B M"]) -> Float[Tensor, "B M L"]:
        """Attention of the patch queries ``index`` to all patch tokens, mean over heads: M rows of the full matrix."""
        q = take(self.q.transpose(1, 2), index + self.prefix).transpose(1, 2).float()
        logits = q @ self._keys_per_query().float().transpose(-2, -1) * self.scale
        if self.mask is not None:
            mask = self.mask.expand(q.shape[0], -1, -1, -1)
            rows = take(mask.transpose(1, 2), index + self.prefix).transpose(1, 2) if mask.shape[2] > 1 else mask
            logits = add_bias(rows, logits)
        return logits.softmax(-1).mean(1)[..., self.prefix :]

    def _keys_per_query(self) -> Tensor:
        return per_query(self.k, self.q.shape[1])

    def _row_heads(self, q: Tensor, *, first: bool = True) -> Tensor:
        # multiply and sum reads the strided keys once; a matmul would copy them first
        logits = (self._keys_per_query().float() * (q.float() * self.scale).unsqueeze(2)).sum(-1)
        if self.mask is not None:
            # a hidden token sees itself: what a query of nobody's sees is what any other token does
            row = self.mask[:, :, 0] if first or self.mask.dtype == torch.bool else self.mask.amin(2)
            logits = add_bias(row, logits)
        return logits.softmax(-1)[..., self.prefix :]
