"""Tokens in two halves, of which one may be merged into the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like, gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.matching import topk_split
from laconic.methods.ops.nearest import nearest


def parity(tokens: Tokens) -> tuple[slice, slice]:
    """The patch tokens at even and at odd places of the sequence, prefix tokens counted (the class token stands at 0)."""
    first = tokens.prefix % 2
    return slice(first, None, 2), slice(1 - first, None, 2)


def by_parity(tokens: Tokens) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B K"]]:
    """The same, as indices."""
    even, odd = parity(tokens)
    place = arange_like(tokens.size)
    return place[:, even], place[:, odd]


def _of(part: Tensor | slice, features: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """Features and indices of some tokens."""
    if isinstance(part, slice):  # every second one: nothing has to be gathered
        return features[:, part], every[:, part]
    return gather_rows(features, part), part


def soft_matching(
    features: Float[Tensor, "B L D"],
    a: Int[Tensor, "B M"] | slice,
    b: Int[Tensor, "B K"] | slice,
    count: int,
    order: Literal["sequence", "similarity"] = "sequence",
) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B R"], Int[Tensor, "B Q"]]:
    """ToMe's bipartite matching of the tokens ``a`` to the tokens ``b`` by the cosine of their features.

    The ``count`` of ``a`` with the most similar match leave: returns (they, the tokens that stay, the rank among these
    of the match of each). The unmatched of ``a`` come first, in their order, then all of ``b``.

    Raises:
        ValueError: more are to leave than there are in ``a``, or there is nothing to merge into.
    """
    features, every = features.detach(), arange_like(features)
    (of_a, a), (of_b, b) = _of(a, features, every), _of(b, features, every)
    if count > a.shape[1] or not b.shape[1]:
        raise ValueError(
            f"one matching merges away at most half of the tokens: {count} of {a.shape[1] + b.shape[1]} were asked for; keep "
            "more in one block, or spread the reduction over more blocks"
        )
    best, match = nearest(of_a, of_b)
    chosen, others = topk_split(best, count)
    others = others.sort(1).values if order == "sequence" else others
    stay = torch.cat([a.gather(1, others), b], 1)
    return a.gather(1, chosen), stay, match.gather(1, chosen) + others.shape[1]
