"""The input of a model's patch embedding, for methods that reduce patches before the first block.

The patch embedding of the supported models is one convolution whose kernel is a patch (in models for clips a tubelet: a patch
of several frames), or a linear layer on flat patches. A
reducer at the first block that overrides the phase ``embed`` gets its input (the pixels of every patch) and its output (the
embeddings, before norms and positions), and returns the group of every patch; the embeddings may be replaced. The groups
belong to the running call (`laconic.core.runtime.Call`), not to the model, and reach the reducer as ``per_token["group"]``.
See `laconic.core.patch_layer` for the layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from laconic.core.shape_types import Float, Int

GROUP = "group"  # the name of the groups in `Tokens.per_token`


@dataclass(frozen=True)
class PatchInput:
    """The patches of a batch at the patch embedding, in raster order.

    ``group`` [B, P] is the first patch of the group that a patch belongs to (itself: it is the first); -1: it is dropped. A
    method that makes no groups may put other numbers of the patches there, for its phase ``before``.
    ``grid`` are the rows and columns of the patches (of a clip: tubelets in time, rows, columns), or None if not known.
    """

    source: Tensor  # the input of the layer: images [B, Z, H, W], clips [B, Z, T, H, W], or flat patches [B, P, D]
    embeddings: Float[Tensor, "B P C"]
    grid: tuple[int, ...] | None
    size: tuple[int, ...]  # height and width of a patch; of a tubelet: frames, height, width
    layout: str  # of the values of a flat patch: "chw" or "hwc"
    project: Callable[[Float[Tensor, "M D"]], Float[Tensor, "M C"]]  # embeds other pixels by the same layer
    group: Int[Tensor, "B P"] | None = None
    new_embeddings: Float[Tensor, "B P C"] | None = None  # replace ``embeddings``

    def grouped(self, group: Int[Tensor, "B P"], new_embeddings: Float[Tensor, "B P C"] | None = None) -> PatchInput:
        """Return the patches with groups and, if given, with other embeddings."""
        return dataclasses.replace(self, group=group, new_embeddings=new_embeddings)

    @property
    def pixels(self) -> Float[Tensor, "B P D"]:
        """The pixels of each patch, as the model was given them (normalised), in the order of ``layout``."""
        if self.source.dim() == 3:
            return self.source
        grid, inside = self.known_grid("laconic"), self.source
        pairs = list(zip(grid, self.size, strict=True))
        for axis, (count, side) in enumerate(pairs, 2):
            inside = inside.narrow(axis, 0, count * side)  # a convolution ignores the rest
        cells = inside.reshape(*inside.shape[:2], *(n for pair in pairs for n in pair))
        counts = range(2, 2 + 2 * len(grid), 2)  # the axes of the grid; after each of them is one of the patch
        cells = cells.permute(0, *counts, 1, *(axis + 1 for axis in counts))
        return cells.reshape(cells.shape[0], math.prod(grid), -1)

    @property
    def directions(self) -> Float[Tensor, "B P C"]:
        """The embeddings minus their mean over the image, with a length of 1 (0 where they equal it), in float32.

        Gradients do not pass through them.
        """
        embeddings = self.embeddings.detach().float()
        return F.normalize(embeddings - embeddings.mean(1, keepdim=True), dim=2)

    def known_grid(self, owner: str) -> tuple[int, ...]:
        """Return the grid.

        Raises:
            ValueError: it is not known, so neighbours cannot be determined.
        """
        if self.grid is None or math.prod(self.grid) != self.embeddings.shape[1]:
            raise ValueError(
                f"{owner} merges neighbouring patches, and the grid of these {self.embeddings.shape[1]} patches is not known; "
                "pass images [B, channels, height, width]"
            )
        return self.grid

    def image_grid(self, owner: str) -> tuple[int, int]:
        """Return the rows and columns of the patches of images.

        Raises:
            ValueError: they are not known, or the patches are tubelets of clips.
        """
        grid = self.known_grid(owner)
        if len(grid) != 2:
            raise ValueError(
                f"{owner} works on the patches of images, and this model takes clips; use run-length, dedup, pre-merge, or a "
                "method that works in blocks"
            )
        return grid

    def clip_grid(self, owner: str) -> tuple[int, int, int]:
        """Return the tubelets in time, rows and columns of the patches of clips.

        Raises:
            ValueError: the patches are those of images, or their grid is not known.
        """
        if self.grid is None or len(self.grid) != 3:
            raise ValueError(
                f"{owner} compares patches with those of the frames before, and this model takes single images; if its batches "
                "are clips, frame after frame, pass frames= (the frames of a clip, e.g. frames=8). Otherwise use dedup, "
                "pre-merge or adaptive-patch, or a model that takes clips [B, frames, channels, height, width]"
            )
        return self.grid

    def images(self) -> Float[Tensor, "B P Z *size"]:
        """Return the pixels of each patch as an image (of a tubelet: as frames), channels first."""
        batch = self.pixels.shape[:2]
        if self.layout == "hwc":
            return self.pixels.reshape(*batch, *self.size, -1).permute(0, 1, 4, 2, 3)
        return self.pixels.reshape(*batch, -1, *self.size)

    def flat(self, images: Float[Tensor, "M Z h w"]) -> Float[Tensor, "M D"]:
        """Return images of a patch's size as flat patches, for ``project``."""
        return (images.permute(0, 2, 3, 1) if self.layout == "hwc" else images).flatten(1)
