"""Adaptive Patch Transformers: larger patches where an image has little detail (Choudhury et al., 2025, arXiv:2510.18091).

Patches form a quadtree: cells of 2 x 2 patches, of 4 x 4 and so on. A cell with little detail becomes one token: its pixels are
resized to those of one patch (the mean of each square of pixels) and embedded by the model's own patch embedding, and its
position embedding is the mean over its patches. Cells at the lower and right edge may be cut off; such a cell is resized too.

Which cells (``detail``):

* ``entropy``, as published: the entropy in bits of the grey values of the cell's pixels (their mean over the channels), in 64
  bins over the range of -3 to 3 of the normalised input.
* ``similarity``: the squared error of the patch embeddings, centred and scaled to a length of 1, if their mean replaces them,
  for each token removed; from 0 to about 2.

How many: with a keep rate or count, exactly that many tokens: the cells of the least detail (the last one in part, if not all
of it may go; such a token is the mean of its patches). With ``threshold``, the cells with at most that detail: each image has
its own number of tokens. A cell counts at least the detail of every cell inside it, so a large cell is never merged before the
cells inside it. Levels beyond ``levels`` are used only if a count cannot be reached without them.

``projection`` adds what the paper trains: a linear layer, zero at the start, on the mean of the patch embeddings of a cell is
added to the embedding of its resized pixels. Departures: the published thresholds are absolute entropies of 8-bit pixels in 512
bins; its sub-patch embeddings are aggregated by strided convolutions before the zero-initialised layer, here by their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveReducer, Execution, is_static
from laconic.core.gather import add_rows, arange_like, gather_rows
from laconic.core.method import BlockContext, MethodInfo, Reducer, method
from laconic.core.patch_input import GROUP, PatchInput
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float, Int
from laconic.core.tokens import Tokens
from laconic.methods.ops import (
    BeforeBlocks,
    Level,
    at_least_below,
    hide_groups,
    levels_of,
    merge_below,
    merge_cheapest,
    merge_groups,
    needed_depth,
    require,
    spread_costs,
    taken,
)

BINS, RANGE = 64, 3.0  # of grey values: from -RANGE to RANGE of the normalised input


def entropies(patches: PatchInput, levels: tuple[Level, ...]) -> Float[Tensor, "B M"]:
    """Return the entropy in bits of the grey values in each node, at least that of the nodes below it."""
    grey = patches.images().detach().float().mean(2).flatten(2)  # [B, P, pixels]
    bins = ((grey / RANGE + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    batch, count = bins.shape[:2]
    flat = (bins + arange_like(bins).unsqueeze(2) * BINS).flatten(1)
    histogram = add_rows(torch.ones_like(flat, dtype=torch.float32), flat, count * BINS).view(batch, count, BINS)
    out: list[Tensor] = []
    for level in levels:
        histogram = add_rows(histogram, level.up.expand(batch, -1), level.nodes)
        share = histogram / histogram.sum(2, keepdim=True)
        out.append(-torch.special.xlogy(share, share).sum(2) / torch.log(torch.tensor(2.0)))
    return at_least_below(out, levels)


def resized(patches: PatchInput, scale: Int[Tensor, "B P"], levels: tuple[Level, ...]) -> Float[Tensor, "B P C"]:
    """Return the embeddings of the patches; those in a whole cell get the embedding of the cell resized to one patch.

    ``scale`` is the level of the largest whole cell around each patch; 0: none.
    """
    (height, width), (rows, columns) = patches.size, patches.image_grid("adaptive-patch")
    cells = patches.images()  # [B, P, Z, h, w]
    batch, _, channels = cells.shape[:3]
    embedded = patches.embeddings
    for number, level in enumerate(levels, 1):
        image = cells.reshape(batch, rows, columns, channels, height, width).permute(0, 3, 1, 4, 2, 5)
        image = image.reshape(batch, channels, rows * height, columns * width)
        if rows % 2:  # a cell that the edge cuts off keeps the pixels it has
            image = torch.cat([image[:, :, :-height], image[:, :, -height:].repeat_interleave(2, 2)], 2)
        if columns % 2:
            image = torch.cat([image[..., :-width], image[..., -width:].repeat_interleave(2, 3)], 3)
        image, (rows, columns) = F.avg_pool2d(image, 2), level.shape
        cells = image.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        cells = cells.reshape(batch, rows * columns, channels, height, width)
        large = patches.project(patches.flat(cells.flatten(0, 1))).view(batch, rows * columns, -1)
        embedded = torch.where((scale == number).unsqueeze(2), large[:, level.node], embedded)
    return embedded


class AdaptivePatchReducer(AdaptiveReducer):
    """Make cells with little detail one token before the first block."""

    def __init__(self, config: AdaptivePatch, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projection: nn.Linear | None = None
        if config.projection:
            self.projection = nn.Linear(dim, dim)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def active(self, before: int, n: int) -> bool:
        return n < before if self.config.threshold is None else super().active(before, n)

    def embed(self, patches: PatchInput, n: int) -> PatchInput:
        grid, count, limit = patches.image_grid("adaptive-patch"), patches.embeddings.shape[1], self.config.threshold
        depth = self.config.levels if limit is not None else needed_depth(grid, n, self.config.levels)
        levels = levels_of(grid, depth, patches.embeddings)
        entropy = self.config.detail == "entropy"
        costs = entropies(patches, levels) if entropy else spread_costs(patches.directions, levels)
        cheapest = limit is None
        group, scale = merge_cheapest(costs, levels, count, n) if cheapest else merge_below(costs, levels, count, limit or 0.0)
        new = resized(patches, scale, levels)
        if self.projection is not None:
            size = add_rows(torch.ones_like(costs[:, :1]).expand(-1, count), group, count)
            mean = add_rows(patches.embeddings.float(), group, count) / size.clamp_min(1).unsqueeze(2)
            added = self.projection(gather_rows(mean, group).to(self.projection.weight.dtype))
            new = torch.where((scale > 0).unsqueeze(2), new + added, new)
        return patches.grouped(group, new)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        group = tokens.per_token[GROUP]
        if self.config.threshold is None:
            tokens = merge_groups(tokens, n)
        elif not is_static() and bool((group == arange_like(group)).all()):
            return taken(tokens)[1]
        else:
            tokens = hide_groups(tokens, mean=True)
        return tokens.replace(attn_scale=tokens.size.clamp_min(1)) if self.config.proportional else tokens


@method(
    "adaptive-patch",
    title="Adaptive patches: larger patches where there is little detail",
    paper="2510.18091",
    phase="before",
    score="features",
    score_detail="detail of the pixels, in a quadtree",
    rest="merged",
    rest_detail="embedded as one larger patch",
    trained=False,
)
@dataclass(frozen=True)
class AdaptivePatch(BeforeBlocks):
    """Options of ``adaptive-patch``.

    Args:
        threshold: merge the cells with at most this detail, instead of a keep rate or count: each image then has its own
            number of tokens (see ``execution``).
        detail: ``entropy`` of the pixels, or ``similarity`` of the patch embeddings.
        levels: sizes of cells: 1 is 2 x 2 patches, 2 adds 4 x 4, and so on.
        projection: add a learned linear layer, zero at the start, on the mean of a cell's patch embeddings.
        proportional: add log(size) to the attention logits towards a token, as ToMe does.
        execution: with a threshold, as in `AdaptiveMethod`.
    """

    threshold: float | None = None
    detail: Literal["entropy", "similarity"] = "similarity"
    levels: int = 2
    projection: bool = False
    proportional: bool = False
    execution: Execution = "packed"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("adaptive-patch", "levels", self.levels, self.levels >= 1, "must be 1 or more")
        if self.threshold is not None:
            require("adaptive-patch", "threshold", self.threshold, self.threshold >= 0, "must be 0 or more")
        changed = {"count": "variable"} if self.threshold is not None else {}
        if changed or self.projection:
            info = MethodInfo(**{**vars(type(self).info), "learns": self.projection, **changed})
            object.__setattr__(self, "info", info)

    @property
    def is_adaptive(self) -> bool:
        return self.threshold is not None

    def build(self, site: BlockContext) -> Reducer:
        return AdaptivePatchReducer(self, site.dim)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.threshold is None:
            return super().default_schedule(depth, keep, at)
        if keep is not None and keep != 1:
            raise ValueError(
                "adaptive-patch: give either threshold (each image has its own number of tokens) or keep, not both"
            )
        schedule = Schedule.adaptive((0,) if at is None else at) if keep is None else Schedule.rates(1.0, (0,))
        self._check_first(schedule)
        return schedule

    def trial(self, image: Tensor) -> Tensor:
        """Return the image with a lower half of zeros, so that a threshold merges cells."""
        image = image.clone()
        image[..., image.shape[-2] // 2 :, :] = 0
        return image

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        embedded = sum(before // 4**level for level in range(1, self.levels + 1))
        return {"matmul": before * site.dim**2 if self.projection else 0, "elementwise": before + embedded}
