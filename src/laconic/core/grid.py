"""The full grid of features from fewer tokens, for hybrid backbones whose blocks process the patches as an image.

A spatial-reduction convolution (PVT), depth-wise convolutions in front of attention (CvT) and the patch embedding of the
next stage all need H x W cells, and after a reduction there are fewer tokens. Every cell then gets the features of the token
that holds its patch, by one gather, without holes and without stale values.

Shapes: B images, P cells of the grid (one a patch, row by row), L patch tokens now, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.gather import arange_like, gather_rows
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens


@dataclass(frozen=True)
class GridMap:
    """The map between grid cells and tokens: the token that each cell shows, and the cell where each token stands."""

    where: Int[Tensor, "B P"]  # `Tokens.token_of_patch`
    place: Int[Tensor, "B L"]  # `Tokens.origin_index`
    alive: Float[Tensor, "B L"] | None = None  # `Tokens.keep_mask`

    @classmethod
    def of(cls, tokens: Tokens) -> GridMap | None:
        """Return the map of these tokens, or None if every patch still has its own token and none is masked."""
        if tokens.origin is None and tokens.keep_mask is None:
            return None
        alive = tokens.keep_mask
        if alive is not None:
            # a visible token without a patch shows nowhere: a package of nothing (SPViT) has the place of a token that is
            # kept, and would be seen there once that token is dropped
            alive = alive.masked_fill((alive > 0) & (tokens.size <= 0), 0.0)
        return cls(tokens.token_of_patch, tokens.origin_index, alive)

    def fill(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B P C"]:
        """Return the full grid; cells of dropped patches are zero.

        With ``alive`` (training: decisions are soft and no token is removed) a cell is ``alive * own + (1 - alive) * holder``:
        ``own`` is the token that stands at the cell, ``holder`` the token that holds its patch. So the values are those of
        inference, and the gradient tells how another decision would have changed them.

        Raises:
            ValueError: ``x`` does not have the shape of the tokens of this map.
        """
        if x.shape[:2] != self.place.shape:
            raise ValueError(
                f"this grid map is for {tuple(self.place.shape)} (images, patch tokens), but got {tuple(x.shape[:2])}; "
                "tokens packed into one row cannot be placed on a grid: run the method with execution='padded'"
            )
        shown = laid(x, self.where)
        if self.alive is None:
            return shown
        here = self._standing()
        alive = laid(self.alive.to(x.dtype).unsqueeze(-1), here)
        return alive * laid(x, here) + (1 - alive) * shown

    def own(self, full: Float[Tensor, "B P C"]) -> Float[Tensor, "B L C"]:
        """Gather the features of a full grid at each token's own cell."""
        return gather_rows(full, self.place)

    def _standing(self) -> Int[Tensor, "B P"]:
        """Return the token that stands at each cell (the first, if there are several), or -1."""
        absent = self.place.shape[1]
        first = torch.full_like(self.where, absent).scatter_reduce(1, self.place, arange_like(self.place), "amin")
        return torch.where(first < absent, first, -1)


def laid(values: Float[Tensor, "B L C"], index: Int[Tensor, "B P"]) -> Float[Tensor, "B P C"]:
    """Gather rows of ``values``; zero for an index of -1."""
    return gather_rows(values, index.clamp_min(0)).masked_fill((index < 0).unsqueeze(-1), 0.0)


def image_of(cells: Float[Tensor, "B P C"], size: tuple[int, ...]) -> Float[Tensor, "B C *size"]:
    """Return cells, given row by row, as an image of ``size`` (rows, columns), or as a clip of (frames, rows, columns)."""
    return cells.transpose(1, 2).reshape(cells.shape[0], cells.shape[2], *size)


def cells_of(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P C"]:
    """Return the cells of an image, row by row."""
    return image.flatten(2).transpose(1, 2)
