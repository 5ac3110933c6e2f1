"""Split of the tokens into two halves, and bipartite matching of one half to the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like, gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.matching import length, topk_split
from laconic.methods.ops.nearest import best_of_rows


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
    first: Int[Tensor, "B Q"] | None = None,
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B R"]]:
    """Match the tokens ``a`` to the tokens ``b`` by the cosine of their features (ToMe's bipartite matching).

    The ``count`` tokens of ``a`` with the most similar match are merged with it. Return the new token of every token, and the
    tokens that are kept: those of ``first``, which are in neither set, then the unmatched of ``a``, in their order
    (``order="sequence"``) or by falling similarity, then all of ``b``.

    Raises:
        ValueError: ``count`` is more than the number of tokens in ``a``, or ``b`` is empty.
    """
    features, every = features.detach().float(), arange_like(features)
    features = features / length(features).unsqueeze(2)
    (of_a, a), (of_b, b) = _of(a, features, every), _of(b, features, every)
    if count > a.shape[1] or not b.shape[1]:
        raise ValueError(
            f"one matching can merge away at most half of the tokens; got {count} of {a.shape[1] + b.shape[1]}; keep "
            "more in one block, or spread the reduction over more blocks"
        )
    other = of_b.transpose(1, 2)
    best, match = best_of_rows(of_a, b.shape[1], lambda part: torch.bmm(part, other))
    chosen, others = topk_split(best, count)
    others = others.sort(1).values if order == "sequence" else others
    left = every.shape[1] - count
    parts = [a.gather(1, others), b, a.gather(1, chosen)]
    line = torch.cat(parts if first is None else [first, *parts], 1)
    new = torch.cat([every[:, :left], match.gather(1, chosen) + (left - b.shape[1])], 1)
    return new.scatter(1, line, new), line[:, :left]
