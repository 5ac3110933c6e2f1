"""Split of the tokens into two halves, and bipartite matching of one half to the other."""

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
    """Return slices of the patch tokens at even and odd positions of the sequence, prefix tokens counted (class token: 0)."""
    first = tokens.prefix % 2
    return slice(first, None, 2), slice(1 - first, None, 2)


def by_parity(tokens: Tokens) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B K"]]:
    """Return the same tokens as `parity`, as indices."""
    even, odd = parity(tokens)
    place = arange_like(tokens.size)
    return place[:, even], place[:, odd]


def _of(part: Tensor | slice, features: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features and the indices of some tokens."""
    if isinstance(part, slice):  # every second token: no gather needed
        return features[:, part], every[:, part]
    return gather_rows(features, part), part


def soft_matching(
    features: Float[Tensor, "B L D"],
    a: Int[Tensor, "B M"] | slice,
    b: Int[Tensor, "B K"] | slice,
    count: int,
    order: Literal["sequence", "similarity"] = "sequence",
) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B R"], Int[Tensor, "B Q"]]:
    """Match the tokens ``a`` to the tokens ``b`` by the cosine of their features (ToMe's bipartite matching).

    The ``count`` tokens of ``a`` with the most similar match are merged. Return (merged tokens, kept tokens, index among the
    kept tokens of the match of each merged one). Of the kept tokens the unmatched of ``a`` come first, then all of ``b``. The
    former are in their order (``order="sequence"``), or by falling similarity.

    Raises:
        ValueError: ``count`` is more than the number of tokens in ``a``, or ``b`` is empty.
    """
    features, every = features.detach(), arange_like(features)
    (of_a, a), (of_b, b) = _of(a, features, every), _of(b, features, every)
    if count > a.shape[1] or not b.shape[1]:
        raise ValueError(
            f"one matching can merge away at most half of the tokens; got {count} of {a.shape[1] + b.shape[1]}; keep "
            "more in one block, or spread the reduction over more blocks"
        )
    best, match = nearest(of_a, of_b)
    chosen, others = topk_split(best, count)
    others = others.sort(1).values if order == "sequence" else others
    stay = torch.cat([a.gather(1, others), b], 1)
    return a.gather(1, chosen), stay, match.gather(1, chosen) + others.shape[1]
