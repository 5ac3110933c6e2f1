"""Few tokens, full grid: what hybrid backbones need whose blocks look at the patches as an image.

A spatial-reduction convolution (PVT), depth-wise convolutions in front of attention (CvT) and the patch embedding of the
next stage all want H x W cells, and after a reduction there are fewer tokens. Every cell then shows the token that its
patch was squeezed into: one gather, without holes and without stale values.

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
    """Which token each cell shows, and at which cell each token stands (the columns of `Tokens` of the same names)."""

    where: Int[Tensor, "B P"]
    place: Int[Tensor, "B L"]
    alive: Float[Tensor, "B L"] | None = None

    @classmethod
    def of(cls, tokens: Tokens) -> GridMap | None:
        """The map of these tokens, or None where every patch still has its own token and all of them are kept."""
        if tokens.origin is None and tokens.keep_mask is None:
            return None
        return cls(tokens.token_of_patch, tokens.origin_index, tokens.keep_mask)

    def fill(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B P C"]:
        """The full grid; cells of dropped patches are zero.

        With ``alive`` (training: decisions are soft, no token has left) a cell shows ``alive * x + (1 - alive) * host``: the
        token that stands there and the one that its patch went to. So what an inference would show is shown, and the
        gradient says what another decision would have changed.

        Raises:
            ValueError: these are not the tokens that the map is of.
        """
        if x.shape[:2] != self.place.shape:
            raise ValueError(
                f"this map of a grid is of {tuple(self.place.shape)} (images, patch tokens), and got {tuple(x.shape[:2])}; "
                "tokens packed into one row cannot be laid on a grid: run the method with execution='padded'"
            )
        shown = laid(x, self.where)
        if self.alive is None:
            return shown
        here = self._standing()
        alive = laid(self.alive.to(x.dtype).unsqueeze(-1), here)
        return alive * laid(x, here) + (1 - alive) * shown

    def own(self, full: Float[Tensor, "B P C"]) -> Float[Tensor, "B L C"]:
        """What a full grid has at each token's own cell."""
        return gather_rows(full, self.place)

    def _standing(self) -> Int[Tensor, "B P"]:
        """The token that stands at each cell (the first, should there be several), or -1."""
        absent = self.place.shape[1]
        first = torch.full_like(self.where, absent).scatter_reduce(1, self.place, arange_like(self.place), "amin")
        return torch.where(first < absent, first, -1)


def laid(values: Float[Tensor, "B L C"], index: Int[Tensor, "B P"]) -> Float[Tensor, "B P C"]:
    """Rows of ``values`` by index; zero where it is -1."""
    return gather_rows(values, index.clamp_min(0)).masked_fill((index < 0).unsqueeze(-1), 0.0)


def image_of(cells: Float[Tensor, "B P C"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
    """Cells, row by row, as an image of so many rows and columns."""
    return cells.transpose(1, 2).reshape(cells.shape[0], cells.shape[2], *size)


def cells_of(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P C"]:
    """The cells of an image, row by row."""
    return image.flatten(2).transpose(1, 2)
