"""Merging by a threshold with tokens kept at their positions (LTMP, arXiv:2307.10780)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.nearest import NO_MATCH, nearest
from laconic.methods.ops.parity import by_parity


def above(values: Tensor, threshold: Tensor, tau: float | None) -> Tensor:
    """Return 1 for values above the threshold, else 0; with tau, gradients are those of sigmoid((value - threshold) / tau)."""
    hard = (values > threshold).to(values.dtype)
    if tau is None:
        return hard
    soft = ((values - threshold) / tau).sigmoid()
    return hard + (soft - soft.detach())


def matches(
    tokens: Tokens, keys: Float[Tensor, "B L D"], decide: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Return 1 for each token that merges (``decide`` of its similarity), else 0, and the token it merges into (else itself).

    Tokens are split by parity; a token of A may merge into the token of B with the most similar key. Hidden tokens take no
    part.
    """
    none, alone, (a, b) = torch.zeros_like(tokens.size), arange_like(tokens.size), by_parity(tokens)
    if not a.shape[1] or not b.shape[1]:
        return none, alone
    hidden = tokens.keep_mask_or_ones.detach() <= 0
    best, match = nearest(gather_rows(keys, a), gather_rows(keys, b), hidden.gather(1, b))
    candidates = (best > NO_MATCH).to(none.dtype) * ~hidden.gather(1, a)
    return none.scatter(1, a, decide(best) * candidates), alone.scatter(1, a, b.gather(1, match))


def absorb(tokens: Tokens, gives: Float[Tensor, "B L"], into: Int[Tensor, "B L"]) -> Tokens:
    """Replace every token by the mean, weighted by `attn_scale`, of itself and the tokens that merge into it (``gives`` 1)."""
    gate, rows = tokens.attn_scale_or_ones, tokens.patches.float()
    given = (gives * gate).unsqueeze(2)
    size = add_rows(given, into, len(tokens))
    new = rows + (add_rows(rows * given, into, len(tokens)) - rows * size) / (gate.unsqueeze(2) + size)
    x = torch.cat([tokens.x[:, : tokens.prefix], new.to(tokens.x.dtype)], 1)
    return tokens.replace(x=x, attn_scale=gate + size.squeeze(2))


def highest_given(values: Float[Tensor, "B L"], gives: Float[Tensor, "B L"], into: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Return the highest value among each token and the tokens that merge into it (``gives`` 1)."""
    return values.scatter_reduce(1, into, values.masked_fill(gives == 0, -torch.inf), "amax")
