"""The share of a model's work that is left, as a loss may aim at it: with a gradient to the decisions of who stays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from laconic.core.block_context import BlockContext
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

WORK = "share of the work"
Count = TypeVar("Count", int, Tensor)


def cost(attended: Count, passed: Count, dim: int) -> Count:
    """Multiply-adds of a block over its width, with so many tokens at its attention and at its (four times wider) MLP."""
    return 4 * dim * attended + 2 * attended**2 + 8 * dim * passed


def work_left(before: Tokens, after: Tokens, site: BlockContext) -> Float[Tensor, " B"]:
    """The share of the whole model's work, if no token leaves after this block (`WORK` in the notes, so far)."""
    rest, dim = site.depth - 1 - site.block, site.dim
    old, new = (before.prefix + tokens.keep_mask_or_ones.sum(1) for tokens in (before, after))
    saved = cost(old, old, dim) * (rest + 1) - cost(old, new, dim) - cost(new, new, dim) * rest
    whole = before.prefix + before.token_of_patch.shape[1]
    return before.per_image.get(WORK, torch.ones_like(saved)) - saved / (site.depth * cost(whole, whole, dim))


def work_planned(tokens: Tokens, site: BlockContext, counts: Sequence[int]) -> float:
    """The same if the blocks left so many patch tokens."""
    all_counts = [tokens.prefix + count for count in (tokens.token_of_patch.shape[1], *counts)]
    planned = sum(cost(before, after, site.dim) for before, after in pairwise(all_counts))
    return planned / (site.depth * cost(all_counts[0], all_counts[0], site.dim))
