"""MixToken (Jiang et al., arXiv:2104.10858): CutMix on patch tokens instead of pixels, so that no patch mixes two images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A rectangle on the patch grid, in patches; ``bottom`` and ``right`` are exclusive."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @classmethod
    def random(cls, grid: tuple[int, int], beta: float) -> Box:
        """Draw a box as CutMix does: its share of the area from Beta(beta, beta), its centre uniform, clipped at the border."""
        cpu = torch.device("cpu")  # the box is used as Python integers: on a GPU, reading it would force a synchronization
        concentration = torch.tensor(beta, device=cpu)
        side = torch.distributions.Beta(concentration, concentration).sample().sqrt().item()
        edges = []
        for length in grid:
            half, centre = int(length * side) // 2, int(torch.randint(length, (), device=cpu))
            edges.append((max(0, centre - half), min(length, centre + half)))
        (top, bottom), (left, right) = edges
        return cls(top, left, bottom, right)

    def share(self, grid: tuple[int, int]) -> float:
        """Return the share of the patches inside, which is the weight of the other image's label."""
        return (self.bottom - self.top) * (self.right - self.left) / (grid[0] * grid[1])

    def exchange(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Swap the patch tokens [B, P, C] inside the box between images b and B - 1 - b. A second call undoes the first."""
        inside = torch.zeros(grid, dtype=torch.bool, device=tokens.device)
        inside[self.top : self.bottom, self.left : self.right] = True
        return torch.where(inside.flatten().unsqueeze(1), tokens.flip(0), tokens)


class Dense(NamedTuple):
    """Training outputs: class logits [B, K], token logits [B, P, K] (of each image's own patches), and the MixToken box.

    Inside the box, image b has the patches of image B - 1 - b; so its class label is mixed with weight ``box.share(grid)``.
    """

    logits: Tensor
    token_logits: Tensor
    box: Box
