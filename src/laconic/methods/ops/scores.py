"""How tokens are scored without learning: by attention, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

Score = Callable[[Tokens, "AttentionView"], Tensor]
ScoreName = Literal["class", "mean-query"]


def class_attention(tokens: Tokens, seen: AttentionView) -> Float[Tensor, "B L"]:
    """Mean over heads of the class token's attention (EViT sec. 3.2; BAT eq. 5)."""
    return seen.cls


def mean_query_attention(tokens: Tokens, seen: AttentionView) -> Float[Tensor, "B L"]:
    """Attention of the mean patch query: the stand-in on hosts without a class token."""
    return seen.mean_query


SCORES: dict[str, Score] = {"class": class_attention, "mean-query": mean_query_attention}


def arbitrary(tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """A score that says nothing: one fixed pseudo-random number for every patch position.

    The same for every image, so that no image depends on its batch-mates and a run can be repeated; draw again by
    changing ``seed``.
    """
    # an integer hash (xorshift-multiply) of position and seed: needs no generator, so it compiles and exports
    h = (tokens.origin_index + ((seed + 1) * 0x9E3779B1 & 0x7FFFFFFF)) & 0x7FFFFFFF  # no sum leaves 64 bits, whatever the seed
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x3C6EF35):
        h = ((h ^ (h >> 15)) * multiplier) & 0x7FFFFFFF
    return h.float() / 0x7FFFFFFF


def shuffled(score: Float[Tensor, "B L"], tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """The same scores for other tokens (the random policy of the TPS paper), by a fixed draw for every place and seed."""
    return score.gather(1, arbitrary(tokens, seed).argsort(dim=1, stable=True))
