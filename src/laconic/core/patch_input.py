"""The input of a model's patch embedding, for methods that reduce patches before the first block.

The patch embedding of the supported models is one convolution whose kernel is a patch, or a linear layer on flat patches. A
reducer at the first block that overrides the phase ``embed`` gets its input (the pixels of every patch) and its output (the
embeddings, before norms and positions), and returns the group of every patch; the embeddings may be replaced. The groups
belong to the running call (`laconic.core.runtime.Call`), not to the model, and reach the reducer as ``per_token["group"]``.
See `laconic.core.patch_layer` for the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from laconic.core.shape_types import Float, Int

GROUP = "group"  # the name of the groups in `Tokens.per_token`


@dataclass(frozen=True)
class PatchInput:
    """The patches of a batch at the patch embedding, in raster order.

    ``group`` [B, P] is the first patch of the group that a patch belongs to (itself: it is the first); -1: it is dropped.
    ``grid`` are the rows and columns of the patches, or None if they are not known.
    """

    source: Tensor  # the input of the layer: images [B, Z, H, W], or flat patches [B, P, D]
    embeddings: Float[Tensor, "B P C"]
    grid: tuple[int, int] | None
    size: tuple[int, int]  # height and width of a patch
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
        (rows, columns), (height, width) = self.known_grid("laconic"), self.size
        batch, channels = self.source.shape[:2]
        inside = self.source[:, :, : rows * height, : columns * width]  # a convolution ignores the rest
        cells = inside.reshape(batch, channels, rows, height, columns, width)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    @property
    def directions(self) -> Float[Tensor, "B P C"]:
        """The embeddings minus their mean over the image, with a length of 1 (0 where they equal it), in float32.

        Gradients do not pass through them.
        """
        embeddings = self.embeddings.detach().float()
        return F.normalize(embeddings - embeddings.mean(1, keepdim=True), dim=2)

    def known_grid(self, owner: str) -> tuple[int, int]:
        """Return the grid.

        Raises:
            ValueError: it is not known, so neighbours cannot be determined.
        """
        if self.grid is None or self.grid[0] * self.grid[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"{owner} merges neighbouring patches, and the grid of these {self.embeddings.shape[1]} patches is not known; "
                "pass images [B, channels, height, width]"
            )
        return self.grid

    def images(self) -> Float[Tensor, "B P Z h w"]:
        """Return the pixels of each patch as an image, channels first."""
        (height, width), batch = self.size, self.pixels.shape[:2]
        if self.layout == "hwc":
            return self.pixels.reshape(*batch, height, width, -1).permute(0, 1, 4, 2, 3)
        return self.pixels.reshape(*batch, -1, height, width)

    def flat(self, images: Float[Tensor, "M Z h w"]) -> Float[Tensor, "M D"]:
        """Return images of a patch's size as flat patches, for ``project``."""
        return (images.permute(0, 2, 3, 1) if self.layout == "hwc" else images).flatten(1)
