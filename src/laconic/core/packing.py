"""Packed execution: if every image has its own number of tokens, the tokens of all images run in one row without padding.

Linear layers and norms process each token independently; attention runs for each image separately. So the cost is that of the
kept tokens, and the result of an image does not depend on the rest of the batch.

Tokens that share the features of a token of another image (`Tokens.shared_from`) are not in the row. The queries of an image
are then those of its tokens in the row, and its keys and values those of all its tokens, shared ones from where they were
computed.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.attention import AttentionTap
from laconic.core.attention_bias import SOFT_FLOOR, shown_of
from laconic.core.gather import table_rows
from laconic.core.tokens import Tokens


@dataclass(frozen=True)
class Packing:
    """The map between a padded batch [B, N] and the packed row [1, T] of the tokens that are run."""

    index: Tensor  # [T] positions in the flattened batch
    lengths: tuple[int, ...]  # tokens of each image, prefix tokens included
    bias: Tensor | None  # [T] bias on the logits towards each token
    shape: tuple[int, int]  # B, N
    rows: Tensor | None = None  # [B N] place in the row of the token whose features each token has; None: none are shared

    @classmethod
    def of(cls, tokens: Tokens) -> Packing | None:
        """Return the packing of the computed tokens, or None if all are computed. Synchronizes with the device."""
        if tokens.shared_from is not None:
            source = tokens.source
            own = source.flatten() == torch.arange(source.numel(), device=source.device)
            lengths = tuple(own.view(source.shape).sum(1).tolist())
            return cls(own.nonzero().flatten(), lengths, None, tokens.shape, (own.cumsum(0) - 1)[source.flatten()])
        shown = shown_of(tokens)
        if shown is None:
            return None
        run = torch.cat([torch.ones_like(shown[:, : tokens.prefix]), shown[:, tokens.prefix :]], 1) > 0
        index = run.flatten().nonzero().flatten()
        bias = None
        if tokens.attn_scale is not None or tokens.visible_prefix is not None:  # hidden prefix tokens are run, but masked
            gate = tokens.attn_scale_or_ones
            factor = shown * F.pad(gate, (tokens.prefix, 0), value=1.0)
            bias = factor.clamp_min(SOFT_FLOOR).log().flatten()[index]
        return cls(index, tuple(run.sum(1).tolist()), bias, (run.shape[0], run.shape[1]))

    def pack(self, x: Tensor) -> Tensor:
        """Pack [B, N, C] into [1, T, C], or [B, N] into [1, T]."""
        return x.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def unpack(self, row: Tensor, x: Tensor) -> Tensor:
        """Return ``x`` [B, N, C] with the tokens of the row [1, T, C] in their places, and where they are shared."""
        if self.rows is not None:
            return row[0].index_select(0, self.rows).to(x.dtype).view(x.shape)
        return x.flatten(0, 1).index_copy(0, self.index, row[0].to(x.dtype)).view(x.shape)

    def heads(self, row: Tensor) -> Tensor:
        """Unpack queries, keys or values [1, H, T, D] to [B, H, N, D].

        Tokens that were not run have those that they share, or zeros.
        """
        if self.rows is not None:
            return row[0].index_select(1, self.rows).view(row.shape[1], *self.shape, -1).transpose(0, 1)
        flat = row.new_zeros(self.shape[0] * self.shape[1], row.shape[1], row.shape[3])
        flat = flat.index_copy(0, self.index, row[0].transpose(0, 1))
        return flat.view(*self.shape, row.shape[1], row.shape[3]).transpose(1, 2)

    def mask(self) -> Tensor:
        """Return the bias on logits towards each token of the padded batch, [B, 1, 1, N]: -inf for tokens that were not run."""
        flat = torch.full((self.shape[0] * self.shape[1],), -torch.inf, device=self.index.device)
        own = torch.zeros_like(self.index, dtype=flat.dtype) if self.bias is None else self.bias.to(flat.dtype)
        return flat.index_copy(0, self.index, own).view(self.shape[0], 1, 1, self.shape[1])

    def rotary(self, table: Tensor, tokens: Tokens) -> Tensor:
        """Return the rotary table of the row from [P, D] or [(B,) H, P, D]: [1, 1 or H, T - prefix, D].

        Models skip only the prefix tokens at the front of the row; prefix tokens of later images get the identity rotation
        (the tables hold sines, then cosines).
        """
        rows = table_rows(table, tokens.origin_index)  # [B, heads, L, D]
        half = rows.shape[-1] // 2
        still = torch.cat([rows.new_zeros(half), rows.new_ones(half)]).expand(*rows.shape[:2], tokens.prefix, -1)
        every = torch.cat([still, rows], 2).transpose(1, 2).flatten(0, 1)  # [B N, heads, D]
        return every.index_select(0, self.index)[tokens.prefix :].transpose(0, 1).unsqueeze(0)

    def watch(self, calls: list[dict[str, Any]], rows: Tensor | None = None) -> AttentionTap:
        """Return a tap that runs attention for each image separately while it is active."""
        if rows is not None:
            raise RuntimeError("this model adds a bias for pairs of patches; use the method with execution='padded'")
        return PackedTap(calls, self)

    def seen(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the recorded calls as if they had been made on the padded batch."""
        return [
            {**call, **{name: self.heads(call[name]) for name in ("query", "key", "value")}, "attn_mask": self.mask()}
            for call in calls
        ]


def varlen() -> Any:
    """Return torch's attention over sequences of different lengths, or None if this version lacks it or its options."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


class PackedTap(AttentionTap):
    """Records the calls, and computes each by one call for every image."""

    def __init__(self, calls: list[dict[str, Any]], packing: Packing) -> None:
        super().__init__(calls)
        self.packing = packing

    def answer(self, func: Any, call: dict[str, Any]) -> Tensor:
        packing, mask = self.packing, call.get("attn_mask")
        shares = packing.rows is not None
        if (mask is not None and not shares) or call.get("is_causal"):
            raise RuntimeError(
                "packed execution does not support the model's own attention mask; use the method with execution='padded'"
            )
        q, k, v = (call[name] for name in ("query", "key", "value"))
        if shares:  # keys and values of all tokens of each image
            k, v = packing.heads(k), packing.heads(v)
        half = q.dtype in (torch.float16, torch.bfloat16)
        if packing.bias is None and mask is None and q.is_cuda and half and varlen() is not None:
            return self._on_device(q, k, v, call.get("scale"))
        rest = {name: value for name, value in call.items() if name not in ("query", "key", "value", "attn_mask")}
        out, start = list[Tensor](), 0
        for number, length in enumerate(packing.lengths):
            own = slice(start, start + length)
            key, value = (x[number : number + 1] if shares else x[:, :, own] for x in (k, v))
            out.append(func(query=q[:, :, own], key=key, value=value, attn_mask=self._bias(own, mask, q.dtype), **rest))
            start += length
        return torch.cat(out, 2)

    def _bias(self, own: slice, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the bias on the logits of the queries ``own``; ``mask`` [..., N, N] is the model's, for pairs of tokens."""
        packing = self.packing
        if mask is not None:
            return mask if mask.shape[-2] == 1 else mask.index_select(-2, packing.index[own] % packing.shape[1])
        return None if packing.bias is None else packing.bias[own].to(dtype).view(1, 1, 1, -1)

    def _on_device(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Run torch's variable-length attention kernel for all images at once."""
        varlen_attn: Any = varlen()
        lengths = self.packing.lengths
        of_keys = lengths if self.packing.rows is None else (self.packing.shape[1],) * len(lengths)
        ends, key_ends = (torch.tensor((0, *n), device=q.device).cumsum(0).to(torch.int32) for n in (lengths, of_keys))
        query, key, value = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # [T, H, D]
        grouped = q.shape[1] != k.shape[1]
        out: Any = varlen_attn(query, key, value, ends, key_ends, max(lengths), max(of_keys), scale=scale, enable_gqa=grouped)
        attended: Tensor = out.transpose(0, 1).unsqueeze(0)
        return attended
