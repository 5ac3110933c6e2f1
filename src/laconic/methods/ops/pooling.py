"""Groups of tokens by position only: runs of a sequence, cells of a grid; and their destinations."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, places
from laconic.core.shape_types import Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.matching import scatter_back, topk_split


def runs(like: Tensor, count: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """Cut a sequence [B, L, ...] into ``count`` runs of nearly equal length; return each token's run and their first tokens."""
    length = like.shape[1]
    return arange_like(like) * count // length, (arange_like(like[:, :count]) * length + count - 1) // count


def cells(place: Int[Tensor, "B L"], grid: tuple[int, int], count: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """Cut the grid of patches into ``count`` non-empty cells; return the cell of each token, and their first tokens.

    Cells are those of `tiling`. If these are fewer than ``count``, or some have no token, cells are split (along the
    raster): each further split goes to the cell whose parts are then the largest (highest averages, ties: the first). So
    every image has ``count`` cells, regardless of its tokens' positions. They are ordered by their first tokens.
    """
    (height, width), (rows, columns) = grid, tiling(grid, count)
    cell = (place // width) * rows // height * columns + (place % width) * columns // width
    order = (cell * (height * width) + place).argsort(dim=1, stable=True)
    cell = cell.gather(1, order)

    def in_cells(values: Tensor) -> Tensor:  # sums by cell
        return add_rows(values.float(), cell, rows * columns).long()

    held = in_cells(torch.ones_like(cell))
    tokens = held.gather(1, cell)
    rank = arange_like(cell) - (held.cumsum(1) - held).gather(1, cell)  # rank inside its cell
    due = topk_split(tokens / rank, count)[0]  # infinite for the first token of each cell
    parts = in_cells(torch.zeros_like(cell).scatter(1, due, 1))
    group = (parts.cumsum(1) - parts).gather(1, cell) + rank * parts.gather(1, cell) // tokens
    new = torch.cat([torch.ones_like(group[:, :1]), group[:, 1:] - group[:, :-1]], 1)  # 1 where a group begins, else 0
    first = order.gather(1, places(new > 0, count))
    lead, by = first.sort(dim=1)
    group = by.argsort(dim=1).gather(1, group)
    return torch.empty_like(group).scatter(1, order, group), lead


def tiling(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Return (rows, columns) of at most ``count`` cells on a grid: as many as possible, none over twice as long as wide."""
    best, out = (False, 0, 0.0), (1, 1)
    for rows in range(1, min(grid[0], count) + 1):
        columns = min(grid[1], count // rows)
        aspect = grid[0] * columns / (grid[1] * rows)
        stretch = max(aspect, 1 / aspect)
        fit = (stretch < 2.001, rows * columns, -stretch)
        if fit > best:
            best, out = fit, (rows, columns)
    return out


def grid_of(owner: str, tokens: Tokens) -> tuple[int, int]:
    """Return the rows and columns of the images' patches.

    Raises:
        ValueError: they are not known, so neighbouring patches cannot be determined, or the model takes clips.
    """
    if tokens.grid is None:
        raise ValueError(
            f"{owner} pools neighbouring patches, and the grid of these {tokens.token_of_patch.shape[1]} patches is not known; "
            "create the model for images of this size (img_size=...)"
        )
    if len(tokens.grid) != 2:
        raise ValueError(
            f"{owner} pools neighbouring patches of an image, and this model takes clips; use avg-pool, pre-merge, tome or "
            "another method that does not need the grid of an image"
        )
    return tokens.grid


def by_place(tokens: Tokens, index: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
    """Return the tokens ``index``, in the order of their positions."""
    return index.gather(1, tokens.origin_index.gather(1, index).argsort(dim=1, stable=True))


def set_out(
    kept: Int[Tensor, "B K"], rest: Int[Tensor, "B R"], group: Int[Tensor, "B R"], lead: Int[Tensor, "B Q"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """Return (dst, lead) of `Tokens.merge`: kept tokens are single and first; ``group`` and ``lead`` refer to the rest."""
    return scatter_back(kept, rest, arange_like(kept), group + kept.shape[1]), torch.cat([kept, rest.gather(1, lead)], 1)
