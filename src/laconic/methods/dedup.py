"""Dedup: patches of the same pixels become one token before the first block.

The idea of PixelPrune (Wang et al., 2026, arXiv:2604.00886): on pages and screens most patches repeat another one exactly, and
nothing is lost in pixels if only one of them enters the model. The first of equal patches in raster order stays, with its own
position embedding; it holds all of them, so its size is their number, and with proportional attention (`laconic.ToMe`) every
token attends to it as to all of them. What is lost is only that equal patches have different positions. If no two patches of
an image are equal, the output is the unreduced model's, bit for bit.

``tolerance`` 0 compares pixels exactly. Above 0, pixel values (as the model gets them, normalised) are rounded to multiples of
it, and patches that round to the same values are equal: their values differ by at most ``tolerance``, but patches that differ
by less may round to different values. Patches are compared by a hash that is sorted, in O(P log P), and then exactly with the
first of the same hash. ``drop="most-frequent"`` drops the most frequent patch, the background, instead of merging it.

Departures: PixelPrune predicts each patch from its neighbours, here all patches of an image are compared; it drops repeated
patches without a trace, here the one that stays holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer, is_static
from laconic.core.gather import add_rows, arange_like, gather_rows, in_parts, joined_parts
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.patch_input import GROUP, PatchInput
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import BeforeBlocks, NoKeepRate, hide_groups, require, taken

MIX = -7046029254386353131  # an odd number whose bits look random: 2**64 divided by the golden ratio


def hashes(values: Int[Tensor, "B P D"]) -> Int[Tensor, "B P"]:
    """Return a hash of 64 bits of every row of 32-bit values."""
    factors = torch.arange(1, values.shape[2] + 1, device=values.device) * MIX
    factors = (factors ^ (factors >> 29)) * MIX | 1
    parts = in_parts(values, values.shape[2])
    return joined_parts([((part ^ (part >> 15)).long() * factors).sum(2) for part in parts])


def equal_patches(pixels: Float[Tensor, "B P D"], tolerance: float) -> Int[Tensor, "B P"]:
    """Return the first patch with the same pixels, for each patch (itself, if there is none before it)."""
    pixels = pixels.detach().float()
    values = (pixels / tolerance).round().int() if tolerance else (pixels + 0.0).view(torch.int32)  # + 0.0: -0.0 is 0.0
    key, order = hashes(values).sort(dim=1, stable=True)
    starts = torch.cat([torch.ones_like(key[:, :1]), (key[:, 1:] != key[:, :-1]).long()], 1)
    run = (arange_like(key) * starts).cummax(1).values  # where the run of equal hashes begins
    first = torch.empty_like(order).scatter(1, order, order.gather(1, run))
    parts, start = in_parts(values, values.shape[2]), 0
    same: list[Tensor] = []
    for part in parts:
        stop = start + part.shape[1]
        same.append((part == gather_rows(values, first[:, start:stop])).all(2))
        start = stop
    return torch.where(joined_parts(same), first, arange_like(first))


def without_background(group: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """Return the groups with -1 for the largest one (ties: the first), if it has several patches and is not the only one."""
    size = add_rows(torch.ones_like(group, dtype=torch.float32), group, group.shape[1])
    most, background = size.max(1, keepdim=True)
    drops = (group == background) & (most > 1) & (most < group.shape[1])
    return group.masked_fill(drops, -1)


class DedupReducer(AdaptiveReducer):
    """Make equal patches one token before the first block."""

    def __init__(self, config: Dedup) -> None:
        super().__init__()
        self.config = config

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        group = equal_patches(patches.pixels, self.config.tolerance)
        return patches.grouped(without_background(group) if self.config.drop != "none" else group)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        group = tokens.per_token[GROUP]
        if not is_static() and bool((group == arange_like(group)).all()):
            return taken(tokens)[1]  # nothing is equal: the blocks run unchanged
        tokens = hide_groups(tokens, mean=self.config.position == "mean")
        return tokens.replace(attn_scale=tokens.size.clamp_min(1)) if self.config.proportional else tokens


@method(
    "dedup",
    title="Dedup: equal patches are one token",
    paper="2604.00886",
    phase="before",
    score="similarity",
    score_detail="equal pixels",
    rest="merged",
    rest_detail="held by the first equal patch",
    trained=False,
    count="variable",
)
@dataclass(frozen=True)
class Dedup(BeforeBlocks, NoKeepRate):
    """Options of ``dedup``, and those of `AdaptiveMethod`.

    Args:
        tolerance: step to which normalised pixel values are rounded before they are compared; 0 compares them exactly.
        drop: drop the ``most-frequent`` patch of an image (its background) instead of keeping one of it, or ``none``.
        position: the token keeps the position of the ``first`` equal patch, or has the ``mean`` of all.
        proportional: add log(size) to the attention logits towards a token, as ToMe does.
    """

    tolerance: float = 0.0
    drop: Literal["none", "most-frequent"] = "none"
    position: Literal["first", "mean"] = "first"
    proportional: bool = True

    tuning_hint: ClassVar[str] = "a tolerance makes more patches equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("dedup", "tolerance", self.tolerance, self.tolerance >= 0, "must be 0 or more")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the first block."""
        return (0,)

    def build(self, site: BlockContext) -> Reducer:
        return DedupReducer(self)

    def trial(self, image: Tensor) -> Tensor:
        """Return the image with a lower half of zeros, so that there are equal patches."""
        image = image.clone()
        image[..., image.shape[-2] // 2 :, :] = 0
        return image
