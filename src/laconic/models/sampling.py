"""Progressive sampling, the patch embedding of PS-ViT (Yue et al., ICCV 2021, arXiv:2108.01684, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple  # type: ignore[attr-defined]
from torch import Tensor, nn

from laconic.models.stems import map_stem


def start_points(grid: tuple[int, int], size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the cell centres of a grid on a map of ``size`` pixels: [P, 2] as (y, x) in pixels, column by column."""
    y, x = (
        (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (length / cells)
        for cells, length in zip(grid, size, strict=True)
    )
    return torch.stack([y.repeat(len(x)), x.repeat_interleave(len(y))], 1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Sample ``maps`` [B, C, H, W] bilinearly at ``points`` [B, P, 2] as (y, x) in pixels: [B, P, C], zero outside.

    Points stay in float32 for maps of any dtype: bfloat16 cannot represent positions between two pixels.
    """
    last = points.new_tensor([max(1, side - 1) for side in maps.shape[-2:]])
    places = (2 * points / last - 1).flip(-1).unsqueeze(2)  # grid_sample expects x first, and corners at -1 and 1
    found = F.grid_sample(maps.to(places.dtype), places, mode="bilinear", padding_mode="zeros", align_corners=True)
    return found.squeeze(3).transpose(1, 2).to(maps.dtype)


class ProgressiveSampling(nn.Module):
    """Turn images [B, 3, H, W] into tokens [B, P, C], sampled at points that the model predicts.

    Tokens are in the order of their start points: column by column. Points are detached between rounds, so that an offset
    gets its gradient from the samples of its own round only.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        grid_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        stem_width: int,
        layers: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size: tuple[int, int] = to_2tuple(grid_size)
        self.stem = map_stem(in_chans, stem_width, embed_dim)
        self.pos_layer = nn.Linear(2, embed_dim)
        self.layers = nn.ModuleList(layers)
        self.offsets = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in layers[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to tokens [B, P, C]."""
        maps = self.stem(x)
        size = (int(maps.shape[-2]), int(maps.shape[-1]))
        points = start_points(self.grid_size, size, maps.device).expand(maps.shape[0], -1, -1)
        found = self._round(0, sample(maps, points), points, size)
        for index, predict in enumerate(self.offsets, 1):
            moved = points + predict(found).to(points.dtype)
            points = moved.detach()
            found = self._round(index, sample(maps, moved) + found, points, size)
        return found

    def stay(self) -> None:
        """Set the offset layers to zero, so that all rounds sample the regular grid."""
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def _round(self, index: int, tokens: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
        share = (points / points.new_tensor(size)).to(tokens.dtype)
        out: Tensor = self.layers[index](tokens + self.pos_layer(share))
        return out
