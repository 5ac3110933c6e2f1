"""MixToken (Jiang et al., arXiv:2104.10858): CutMix on tokens instead of pixels, so that no patch is of two images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A rectangle on the grid of patches, in patches; ``bottom`` and ``right`` are outside."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @classmethod
    def random(cls, grid: tuple[int, int], beta: float) -> Box:
        """CutMix's: of a share of the area that is Beta(beta, beta), centred anywhere, cut off at the border."""
        cpu = torch.device("cpu")  # it decides on shapes: nobody should wait for a device
        concentration = torch.tensor(beta, device=cpu)
        side = torch.distributions.Beta(concentration, concentration).sample().sqrt().item()
        edges = []
        for length in grid:
            half, centre = int(length * side) // 2, int(torch.randint(length, (), device=cpu))
            edges.append((max(0, centre - half), min(length, centre + half)))
        (top, bottom), (left, right) = edges
        return cls(top, left, bottom, right)

    def share(self, grid: tuple[int, int]) -> float:
        """The share of the patches that are inside: what the other image's label counts."""
        return (self.bottom - self.top) * (self.right - self.left) / (grid[0] * grid[1])

    def exchange(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens [B, P, C] with those inside taken from the image at the mirrored place of the batch; twice: undone."""
        inside = torch.zeros(grid, dtype=torch.bool, device=tokens.device)
        inside[self.top : self.bottom, self.left : self.right] = True
        return torch.where(inside.flatten().unsqueeze(1), tokens.flip(0), tokens)


class Dense(NamedTuple):
    """What is trained: class logits [B, K], token logits [B, P, K] (of each image's own patches), and the MixToken box.

    Image b has, inside the box, the patches of image B - 1 - b; so its class label is mixed by ``box.share(grid)``.
    """

    logits: Tensor
    token_logits: Tensor
    box: Box
