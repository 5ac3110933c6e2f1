"""Groups that tokens make by their place alone: runs of a sequence, cells of a grid; and which tokens are to be grouped."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like
from laconic.core.shape_types import Int
from laconic.core.tokens import Tokens
from laconic.methods.ops.matching import scatter_back, topk_split


def runs(like: Tensor, count: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """A sequence [B, L, ...] cut into ``count`` runs of as equal length as can be: each token's run, their first tokens."""
    length = like.shape[1]
    return arange_like(like) * count // length, (arange_like(like[:, :count]) * length + count - 1) // count


def cells(place: Int[Tensor, "B L"], grid: tuple[int, int], count: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """The grid of patches cut into ``count`` cells with tokens in each: the cell of each token, and their first tokens.

    Cells are those of `tiling`. Where that has fewer than ``count``, or some without a token, cells are cut up (along the
    raster): the cut that is still due goes to the cell whose parts are the largest then (highest averages, ties: the
    first). So every image has ``count`` of them, wherever its tokens stand. They come in the order of their first tokens.
    """
    (height, width), (rows, columns) = grid, tiling(grid, count)
    cell = (place // width) * rows // height * columns + (place % width) * columns // width
    order = (cell * (height * width) + place).argsort(dim=1, stable=True)
    cell = cell.gather(1, order)

    def in_cells(values: Tensor) -> Tensor:  # sums by cell
        return add_rows(values.float(), cell, rows * columns).long()

    held = in_cells(torch.ones_like(cell))
    tokens = held.gather(1, cell)
    rank = arange_like(cell) - (held.cumsum(1) - held).gather(1, cell)  # inside its cell
    due = topk_split(tokens / rank, count)[0]  # the first of each cell: infinite
    parts = in_cells(torch.zeros_like(cell).scatter(1, due, 1))
    group = (parts.cumsum(1) - parts).gather(1, cell) + rank * parts.gather(1, cell) // tokens
    new = torch.cat([torch.ones_like(group[:, :1]), group[:, 1:] - group[:, :-1]], 1)  # 1 where a group begins, else 0
    first = order.gather(1, new.sort(dim=1, descending=True, stable=True).indices[:, :count])
    lead, by = first.sort(dim=1)
    group = by.argsort(dim=1).gather(1, group)
    return torch.empty_like(group).scatter(1, order, group), lead


def tiling(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """(rows, columns) of at most ``count`` cells on a grid: as many as can be, none more than twice as long as wide."""
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
    """Rows and columns of the images' patches.

    Raises:
        ValueError: they are not known, so that it cannot be said which patches are neighbours.
    """
    if tokens.grid is None:
        raise ValueError(
            f"{owner} pools neighbouring patches, and the grid of these {tokens.token_of_patch.shape[1]} patches is not known; make the "
            "model for images of their size (img_size=...)"
        )
    return tokens.grid


def by_place(tokens: Tokens, index: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
    """The tokens ``index``, in the order of their places."""
    return index.gather(1, tokens.origin_index.gather(1, index).argsort(dim=1, stable=True))


def set_out(
    kept: Int[Tensor, "B K"], rest: Int[Tensor, "B R"], group: Int[Tensor, "B R"], lead: Int[Tensor, "B Q"]
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """(dst, lead) of all tokens, where those kept stay alone and come first; ``group`` and ``lead`` are of the rest."""
    return scatter_back(kept, rest, arange_like(kept), group + kept.shape[1]), torch.cat([kept, rest.gather(1, lead)], 1)
