"""Scores without parameters: by attention, or arbitrary."""

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
    """Return the mean over heads of the class token's attention (EViT sec. 3.2; BAT eq. 5)."""
    return seen.cls


def mean_query_attention(tokens: Tokens, seen: AttentionView) -> Float[Tensor, "B L"]:
    """Return the attention of the mean patch query, which replaces class attention in backbones without a class token."""
    return seen.mean_query


SCORES: dict[str, Score] = {"class": class_attention, "mean-query": mean_query_attention}


def arbitrary(tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """Return an arbitrary score: a fixed pseudo-random number for every patch position.

    It is the same for every image, so that no image depends on the other images of its batch and a run can be repeated;
    another ``seed`` gives other numbers.
    """
    # an integer hash (xorshift-multiply) of position and seed: needs no generator, so it compiles and exports
    h = (tokens.origin_index + ((seed + 1) * 0x9E3779B1 & 0x7FFFFFFF)) & 0x7FFFFFFF  # no sum exceeds 64 bits, for any seed
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x3C6EF35):
        h = ((h ^ (h >> 15)) * multiplier) & 0x7FFFFFFF
    return h.float() / 0x7FFFFFFF


def shuffled(score: Float[Tensor, "B L"], tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """Permute the scores among the tokens (the random policy of the TPS paper), fixed by their positions and the seed."""
    return score.gather(1, arbitrary(tokens, seed).argsort(dim=1, stable=True))
