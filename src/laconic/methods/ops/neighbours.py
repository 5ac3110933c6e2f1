"""Merge neighbouring patches of a grid, in rounds: a quarter of the tokens in each, those of the lowest cost."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, first_least, gather_rows, places
from laconic.core.shape_types import Float, Int

SHARE = 0.25  # of its tokens that a round merges away at most: fewer rounds are worse, more take longer
FAR = 1e30  # the cost of a merge with a token that is no neighbour


def edges_of(grid: tuple[int, ...], like: Tensor) -> tuple[Int[Tensor, " E"], Int[Tensor, " E"]]:
    """Return all pairs of patches side by side, then all one below the other; on the device of ``like``.

    The patches of a clip, with a grid of three sides, have neighbours in their own frame only.
    """
    patch = torch.arange(prod(grid), device=like.device).view(grid)
    one = torch.cat([patch[..., :-1].flatten(), patch[..., :-1, :].flatten()])
    return one, torch.cat([patch[..., 1:].flatten(), patch[..., 1:, :].flatten()])


def merge_neighbours(features: Float[Tensor, "B P D"], grid: tuple[int, ...], count: int) -> Int[Tensor, "B P"]:
    """Merge tokens with neighbours until ``count`` are left; return the first patch of each patch's token.

    In a round the tokens are two sets of equal size, like the fields of a chessboard. Each token of the first set may merge
    into the neighbour in the second one for which the cost is the lowest: Ward's, the squared error that their common mean
    adds. The merges of the lowest costs are made. Ties go to the first pair. All shapes depend on grid and count only.
    """
    batch, patches = features.shape[:2]
    one, other = edges_of(grid, features)
    x, size = features, torch.ones_like(features[:, :, 0])
    token = lead = torch.arange(patches, device=features.device).expand(batch, -1)
    while x.shape[1] > count:
        length = x.shape[1]
        removed = min(length - count, max(1, int(length * SHARE)))
        dst, row, kept = _round(x, size, lead, (token[:, one], token[:, other]), grid[-1], removed)
        total = add_rows(size, dst, length - removed, row)
        x = add_rows(x * size.unsqueeze(2), dst, length - removed, row) / total.unsqueeze(2)
        size, token, lead = total, dst.gather(1, token), kept
    return lead.gather(1, token)


def _round(
    x: Tensor, size: Tensor, lead: Int[Tensor, "B L"], ends: tuple[Tensor, Tensor], columns: int, removed: int
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Return the new index of each token, and a token and the first patch of each new one; ``ends`` are the tokens of edges."""
    length, own = x.shape[1], arange_like(lead)
    colour = (own + lead // columns * (columns + 1)) % 2
    first = places(colour == 0, (length + 1) // 2)
    moves = torch.zeros_like(lead).scatter(1, first, 1)  # 1 for the tokens of the first set
    a, b = ends
    from_a, from_b = moves.gather(1, a) > 0, moves.gather(1, b) > 0
    source, target = torch.where(from_a, a, b), torch.where(from_a, b, a)
    together = size.gather(1, a) * size.gather(1, b) / (size.gather(1, a) + size.gather(1, b))
    cost = (gather_rows(x, a) - gather_rows(x, b)).square().sum(2) * together
    cost = cost.masked_fill(from_a == from_b, torch.inf)
    best = first_least(cost, source, length)
    least = cost.gather(1, best).masked_fill(source.gather(1, best) != own, torch.inf)
    alone = least == torch.inf  # no neighbour in the other set: it merges with any token of it, but last
    into = torch.where(alone, places(moves == 0, 1), target.gather(1, best))
    price = least.clamp_max(FAR).masked_fill(moves == 0, torch.inf)
    merged = price.sort(dim=1, stable=True).indices[:, :removed]
    group = own.scatter(1, merged, into.gather(1, merged))
    firsts = torch.full_like(lead, 2**31 - 1).scatter_reduce(1, group, lead, "amin")
    kept, order = firsts.sort(dim=1, stable=True)  # tokens that were merged away have no first patch, and come last
    new = torch.empty_like(order).scatter(1, order, own)
    return new.gather(1, group), order[:, : length - removed], kept[:, : length - removed]
