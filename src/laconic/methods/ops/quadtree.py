"""A quadtree on the grid of patches: cells of 2 x 2, 4 x 4, … patches are merged, the most uniform first.

A node of the tree merges the four cells below it (fewer at the lower and right edge of a grid whose sides are not powers of
two). Its cost is at least that of the nodes below it, so the nodes of the lowest costs, up to any number of them, form whole
cells: a node is never merged before those below it. All shapes depend on the grid only.

Shapes: B images, P patches in raster order, M nodes of all levels (level 1, the 2 x 2 cells, first).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from laconic.core.gather import add_rows, gather_rows
from laconic.core.shape_types import Float, Int


class Level(NamedTuple):
    """The nodes of one level."""

    shape: tuple[int, int]  # rows and columns of the nodes
    node: Int[Tensor, " P"]  # the node of each patch, counted from 0 in this level
    up: Int[Tensor, " N"]  # the node above each node of the level below (above each patch, for the lowest level)
    first: Int[Tensor, " P"]  # the upper left patch of the node of each patch
    child: Int[Tensor, " P"]  # the number of the child of the node that a patch belongs to
    removed: Int[Tensor, " M"]  # tokens that each node removes: its children but one

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return self.shape[0] * self.shape[1]


def levels_of(grid: tuple[int, int], depth: int, like: Tensor) -> tuple[Level, ...]:
    """Return the lowest ``depth`` levels of the tree on a grid of (rows, columns); fewer if the grid is smaller.

    Tensors are on the device of ``like``.
    """
    out: list[Level] = []
    below = grid
    row, column = (torch.arange(size, device=like.device) for size in grid)
    for level in range(1, depth + 1):
        if below == (1, 1):
            break
        shape = -(-below[0] // 2), -(-below[1] // 2)
        high, wide = (m - 2 * torch.arange(n, device=like.device) for n, m in zip(shape, below, strict=True))
        high, wide = high.clamp_max(2), wide.clamp_max(2)
        r, c = row // 2**level, column // 2**level
        node = (r.unsqueeze(1) * shape[1] + c).flatten()
        first = (r.unsqueeze(1) * 2**level * grid[1] + c * 2**level).flatten()
        child = ((row // 2 ** (level - 1) % 2).unsqueeze(1) * wide[c] + column // 2 ** (level - 1) % 2).flatten()
        lower, left = (torch.arange(n, device=like.device) // 2 for n in below)
        up = (lower.unsqueeze(1) * shape[1] + left).flatten()
        out.append(Level(shape, node, up, first, child, (high.unsqueeze(1) * wide - 1).flatten()))
        below = shape
    return tuple(out)


def needed_depth(grid: tuple[int, int], count: int, least: int) -> int:
    """Return the number of levels, ``least`` or more, that can leave ``count`` tokens of a grid."""
    depth = least
    while -(-grid[0] // 2**depth) * -(-grid[1] // 2**depth) > count:
        depth += 1
    return depth


def spread_costs(features: Float[Tensor, "B P D"], levels: tuple[Level, ...]) -> Float[Tensor, "B M"]:
    """Return the cost of each node: the squared error that it adds if means replace features, for each token it removes."""
    mean, size = features, torch.ones_like(features[:, :, 0])
    out: list[Tensor] = []
    for level in levels:
        up = level.up.expand(features.shape[0], -1)
        total = add_rows(size, up, level.nodes)
        center = add_rows(mean * size.unsqueeze(2), up, level.nodes) / total.unsqueeze(2)
        error = add_rows((mean - gather_rows(center, up)).square().sum(2) * size, up, level.nodes)
        out.append(error / level.removed.clamp_min(1))
        mean, size = center, total
    return at_least_below(out, levels)


def at_least_below(costs: list[Tensor], levels: tuple[Level, ...]) -> Float[Tensor, "B M"]:
    """Return the costs [B, nodes] of all levels, each raised to that of the nodes below it."""
    out = costs[:1]
    for cost, level in zip(costs[1:], levels[1:], strict=True):
        below = torch.zeros_like(cost).scatter_reduce(1, level.up.expand(cost.shape[0], -1), out[-1], "amax")
        out.append(torch.maximum(cost, below))
    return torch.cat(out, 1)


def merge_cheapest(
    costs: Float[Tensor, "B M"], levels: tuple[Level, ...], patches: int, count: int
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Merge the nodes of the lowest costs until ``count`` tokens are left (see `_cells`).

    Ties go to the lower level, then to the first node. The last node is merged in part if not all of it may go.
    """
    removed = torch.cat([level.removed for level in levels]).expand(costs.shape[0], -1)
    order = costs.sort(dim=1, stable=True).indices
    so_far = removed.gather(1, order).cumsum(1)
    left = (patches - count) - (so_far - removed.gather(1, order))  # tokens still to remove before each node
    whole = torch.empty_like(order).scatter(1, order, (so_far <= patches - count).long()) > 0
    part = torch.empty_like(order).scatter(1, order, left.clamp_min(0)) * ~whole
    return _cells(whole, part, levels, patches)


def merge_below(
    costs: Float[Tensor, "B M"], levels: tuple[Level, ...], patches: int, limit: float
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Merge the nodes whose cost is at most ``limit`` (see `_cells`)."""
    whole = costs <= limit
    return _cells(whole, torch.zeros_like(whole, dtype=torch.long), levels, patches)


def _cells(
    whole: Tensor, part: Tensor, levels: tuple[Level, ...], patches: int
) -> tuple[Int[Tensor, "B P"], Int[Tensor, "B P"]]:
    """Return the first patch of the cell of each patch, and the level of the largest whole cell around it (0: none).

    ``whole`` [B, M] are the nodes that are merged; of a node with ``part`` = k > 0 only the first k + 1 children are.
    """
    group, start = torch.arange(patches, device=whole.device).expand(whole.shape[0], -1), 0
    scale = torch.zeros_like(group)
    for number, level in enumerate(levels, 1):
        stop = start + level.nodes
        whole_here, part_here = whole[:, start:stop][:, level.node], part[:, start:stop][:, level.node]
        group = torch.where(whole_here | (level.child <= part_here) & (part_here > 0), level.first, group)
        scale, start = torch.where(whole_here, number, scale), stop
    return group, scale
