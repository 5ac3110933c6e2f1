"""The remaining share of a model's work, for use in a loss: with a gradient to the keep decisions."""

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
    """Return a block's multiply-adds over its width, for these token counts at attention and (4x wider) MLP."""
    return 4 * dim * attended + 2 * attended**2 + 8 * dim * passed


def work_left(before: Tokens, after: Tokens, site: BlockContext) -> Float[Tensor, " B"]:
    """Return the share of the model's work if no token is removed after this block (``per_image[WORK]``: so far)."""
    rest, dim = site.depth - 1 - site.block, site.dim
    old, new = (before.prefix + tokens.keep_mask_or_ones.sum(1) for tokens in (before, after))
    saved = cost(old, old, dim) * (rest + 1) - cost(old, new, dim) - cost(new, new, dim) * rest
    whole = before.prefix + before.token_of_patch.shape[1]
    return before.per_image.get(WORK, torch.ones_like(saved)) - saved / (site.depth * cost(whole, whole, dim))


def work_planned(tokens: Tokens, site: BlockContext, counts: Sequence[int]) -> float:
    """Return the share of the model's work if each block keeps ``counts`` patch tokens."""
    all_counts = [tokens.prefix + count for count in (tokens.token_of_patch.shape[1], *counts)]
    planned = sum(cost(before, after, site.dim) for before, after in pairwise(all_counts))
    return planned / (site.depth * cost(all_counts[0], all_counts[0], site.dim))
