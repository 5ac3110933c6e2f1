"""Convolutional stems: LV-ViT's, which computes the patch tokens, and PS-ViT's, which computes a feature map to sample."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import to_2tuple  # type: ignore[attr-defined]
from torch import Tensor, nn


class Stem(nn.Module):
    """LV-ViT's stem: three convolutions at half resolution, then an 8 x 8 one of stride 8: [B, C, H / 16, W / 16]."""

    def __init__(self, img_size: int | Sequence[int], in_chans: int, embed_dim: int, width: int) -> None:
        super().__init__()
        self.img_size: tuple[int, int] = to_2tuple(img_size)
        if any(side % 16 for side in self.img_size):
            raise ValueError(f"img_size must be multiples of 16 pixels; got {self.img_size}")
        self.grid_size = (self.img_size[0] // 16, self.img_size[1] // 16)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, embed_dim, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, C, H / 16, W / 16].

        Raises:
            ValueError: the images are not of the size that the position embeddings are for.
        """
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"this model expects images of {self.img_size} pixels, got {tuple(x.shape[-2:])}; create it with img_size="
            )
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        out: Tensor = self.proj(x)
        return out


class Bottleneck(nn.Module):
    """ResNet's bottleneck at stride 1, [B, C, H, W] -> [B, D, H, W]; the shortcut has a convolution if the widths differ."""

    def __init__(self, in_chans: int, out_chans: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_chans, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans)
        shortcut = (nn.Conv2d(in_chans, out_chans, 1, bias=False), nn.BatchNorm2d(out_chans))
        self.downsample = nn.Identity() if in_chans == out_chans else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, D, H, W]."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        out: Tensor = (self.bn3(self.conv3(y)) + self.downsample(x)).relu()
        return out


def map_stem(in_chans: int, middle: int, embed_dim: int) -> nn.Sequential:
    """Return PS-ViT's stem: [B, 3, H, W] to [B, C, H / 4, W / 4]; ``middle`` is the width between its two bottlenecks."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        Bottleneck(64, middle),
        Bottleneck(middle, embed_dim),
    )
