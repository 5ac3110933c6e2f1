"""Patch Slimming for Efficient Vision Transformers (Tang et al., CVPR 2022, arXiv:2106.02852).

Every block l has a mask m_l over the patch positions, the same for all images, and the masks are nested: a block keeps a
subset of the positions that the block before it kept. Tokens outside m_l are dropped between attention and MLP, so that the
next block sees only keys and values of m_l. Nothing is scored at run time. The masks are found once, from the last block
down, by the impact of a patch on the features that the classifier reads: `laconic.calibrate` does this, and its result is
saved with the model.

Before calibration the positions are a placeholder, spread evenly over the grid and also nested: such a model runs, and drops
as many patches as after calibration, but arbitrary ones. ``repr(model)`` shows for every reducer if it is calibrated.

Departures (there is no official code): the paper omits the attention rows of the dropped patches, here they are computed and
dropped. If the keep rates are warmed in, or the schedule is changed, a block keeps the most important of its positions if it
keeps fewer than these, or all of its positions and some of the placeholder's if it keeps more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.shape_types import Int
from laconic.core.text_table import by
from laconic.core.tokens import Tokens
from laconic.methods.ops import topk_split


def evenly_spread(patches: int) -> Int[Tensor, P]:
    """Return all positions, ordered so that the first n are spread evenly for any n (multiples of the golden ratio mod 1)."""
    return ((torch.arange(patches) * 0x9E3779B1) & 0xFFFFFFFF).argsort(stable=True)


class StaticPrune(Reducer):
    """Keep the patch positions ``kept``, the most important first; ``calibrated`` is False while they are a placeholder."""

    kept: Int[Tensor, K]
    calibrated: Tensor
    others: Int[Tensor, P]
    reads = "class"

    def __init__(self, site: BlockContext) -> None:
        super().__init__()
        self.grid = site.grid
        spread = evenly_spread(math.prod(site.grid))
        self.register_buffer("kept", spread[: site.after].clone())
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self.register_buffer("others", spread.argsort(), persistent=False)  # the rank of each position if it is not kept

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        patches = tokens.token_of_patch.shape[1]
        if patches != len(self.others):
            raise ValueError(
                f"patch-slimming was built for {by(self.grid)} = {len(self.others)} patches and got {patches}: "
                "its positions belong to one image size; resize the images, or create the model for theirs and calibrate again"
            )
        rank = (self.others + len(self.kept)).scatter(0, self.kept, torch.arange(len(self.kept), device=self.kept.device))
        return tokens.keep(topk_split(-rank[tokens.origin_index].float(), n)[0])

    def hold(self, kept: Int[Tensor, K]) -> None:
        """Set the positions to keep, the most important first.

        Raises:
            ValueError: their number is not the one the reducer was built for, or one is not a position, or is repeated.
        """
        different = {int(i) for i in kept}
        if not (len(different) == len(kept) == len(self.kept) and different <= set(range(len(self.others)))):
            raise ValueError(
                f"patch-slimming was built to keep {len(self.kept)} of {len(self.others)} positions here, each once; "
                f"got {len(kept)}, {len(different)} of them different: {kept}"
            )
        self.kept.copy_(kept)
        self.calibrated.fill_(True)

    def extra_repr(self) -> str:
        return f"keep {len(self.kept)} of {len(self.others)} patches, calibrated={bool(self.calibrated)}"


@method(
    "patch-slimming",
    title="Patch Slimming: the same patches of every image, chosen from the last layer down",
    paper="2106.02852",
    phase="between",
    score="position",
    score_detail="position, calibrated",
    rest="dropped",
    trained=True,
)
@dataclass(frozen=True)
class PatchSlimming(Method):
    """Options of ``patch-slimming``: none; `laconic.calibrate` finds the positions, and with a tolerance the counts."""

    def build(self, site: BlockContext) -> Reducer:
        return StaticPrune(site)
