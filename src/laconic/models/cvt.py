"""CvT: Convolutional vision Transformer (Wu et al., ICCV 2021, arXiv:2103.15808), with the authors' parameter names.

Three stages of overlapping patches. Depth-wise 3 x 3 convolutions on the grid precede attention: queries are computed at
every cell, keys and values at every other one in each direction. There are no position embeddings, and only the last stage
has a class token. Checked against the authors' code: LayerNorm eps 1e-5, attention scaled by the full width (not by the head
dimension), QuickGELU, a drop path rate that grows over the layers of a stage, a class token that bypasses the convolutions.
From memory, and as in transformers' port: the sizes of CvT-13 and CvT-21, drop path in the last stage only, the crop of images.

With reduced tokens BatchNorm sees repeated cells; keep it in evaluation mode when you fine-tune a reduced model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, QuickGELU, trunc_normal_  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from laconic.analysis.layer_macs import Work, attention, layers
from laconic.core.backbone import StageSpec
from laconic.core.grid import GridMap, cells_of, image_of
from laconic.core.shape_types import Float
from laconic.models.block import imagenet, init_linear, rates, unwrap
from laconic.models.layouts import CVT as PORTED
from laconic.models.layouts import renamed
from laconic.models.pyramid import PatchEmbed, Pyramid, Size

EPS = 1e-5
ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
PATCHES = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of the three patch embeddings


class ConvProjection(nn.Module):
    """A depth-wise convolution and BatchNorm: image [B, C, H, W] to cells [B, P, C] at every ``stride``-th row and column."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P C"]:
        """Return the cells in raster order."""
        return cells_of(self.bn(self.conv(image)))


class Attention(nn.Module):
    """Attention from every token to a quarter of the grid's cells, and to the class token if there is one."""

    def __init__(self, dim: int, heads: int, prefix: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.prefix = heads, dim // heads, prefix
        self.scale = dim**-0.5
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (ConvProjection(dim, stride) for stride in (1, 2, 2))
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Float[Tensor, "B N C"], size: Size, grid: GridMap | None = None) -> Float[Tensor, "B N C"]:
        """Attend as described in `Block`."""
        cls, body = x[:, : self.prefix], x[:, self.prefix :]
        image = image_of(body if grid is None else grid.fill(body), size)
        at_cells = self.conv_proj_q(image)
        rows = (at_cells if grid is None else grid.own(at_cells), self.conv_proj_k(image), self.conv_proj_v(image))
        layers = (self.proj_q, self.proj_k, self.proj_v)
        q, k, v = (self._heads(layer(torch.cat([cls, row], 1))) for layer, row in zip(layers, rows, strict=True))
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class Block(nn.Module):
    """Two residual halves; the convolutions before attention always run on the full grid.

    Keywords of its forward: ``size``, rows and columns of the full grid; ``grid``, the token that each cell shows, None if no
    tokens were removed. Norms, linear projections and the MLP run on the kept tokens.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, prefix: int, drop_path: float, act: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, prefix)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio), act_layer=act)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B N C"], *, size: Size, grid: GridMap | None = None) -> Float[Tensor, "B N C"]:
        """Return the tokens after attention and MLP."""
        x = x + self.drop_path(self.attn(self.norm1(x), size, grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def work(self, at_attention: int, at_mlp: int, shape: StageSpec) -> Work:
        """Return the work in a stage of this shape, for token counts at attention and at MLP (see `analysis.layer_macs`)."""
        cells = prod((side + 1) // 2 for side in shape.grid)
        keys = cells + self.attn.prefix
        rows = {"conv_proj_q": shape.patches, "conv_proj_k": cells, "conv_proj_v": cells, "proj_k": keys, "proj_v": keys}
        at = {f"attn.{name}": count for name, count in rows.items()}

        def of(name: str) -> int:
            part = ".".join(name.split(".")[:2])
            return at.get(part, at_mlp if part.startswith(("norm2", "mlp")) else at_attention)

        return layers(self, of) + attention(self.attn, at_attention, keys)


class Stage(nn.Module):
    """A patch embedding, an optional class token, and blocks."""

    def __init__(self, embed: PatchEmbed, dim: int, prefix: int, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.patch_embed, self.blocks = embed, nn.ModuleList(blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if prefix else None

    def forward(self, image: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        """Return the input tokens of the first block, the class token first, and their grid."""
        x, size = self.patch_embed(image)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return x, size


class ConvolutionalVisionTransformer(Pyramid):
    """CvT, with the interface of a timm model.

    Args:
        img_size: pixels of a side, or (height, width), assumed by summaries; the model runs on images of any size.
        in_chans: channels of the images.
        num_classes: classes, or 0 for no head.
        global_pool: ``token`` reads the class token, ``avg`` the mean of the patches of the last stage, ``""`` nothing.
        drop_path_rate: drop path rate of the last block; it grows linearly from 0 over the layers of the last stage.
        act: ``quick_gelu``, which the published weights were trained with, or the exact ``gelu``.
        depths, embed_dims, num_heads: one value for each of the three stages.
        mlp_ratio: width of the MLP relative to the stage's width.

    Raises:
        ValueError: ``act`` is unknown.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
        act: Literal["quick_gelu", "gelu"] = "quick_gelu",
        depths: Sequence[int] = (1, 2, 10),
        embed_dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(img_size, embed_dims[-1], num_classes, global_pool, EPS)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATIONS))}, not {act!r}")
        channels = (in_chans, *embed_dims)
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            last = i == len(depths) - 1
            drops = rates(drop_path_rate if last else 0.0, depth)
            blocks = [Block(dim, num_heads[i], mlp_ratio, int(last), drop, ACTIVATIONS[act]) for drop in drops]
            self.add_module(f"stage{i}", Stage(PatchEmbed(channels[i], dim, *PATCHES[i], EPS), dim, int(last), blocks))
        self.patch_embed.img_size = self.img_size  # timm reads the input size here
        self.apply(init_linear)
        trunc_normal_(self.stages[-1].cls_token, std=0.02)

    @property
    def patch_embed(self) -> Any:
        """The patch embedding of the first stage, which takes the image."""
        return self.stages[0].patch_embed

    @property
    def grid_sizes(self) -> list[Size]:
        """Rows and columns of each stage's grid for images of the model's own size."""
        (height, width), sizes = self.img_size, list[Size]()
        for kernel, stride, padding in PATCHES:
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            sizes.append((height, width))
        return sizes

    @property
    def stages(self) -> list[Any]:
        """The three stages."""
        return [getattr(self, f"stage{i}") for i in range(len(PATCHES))]

    def embeddings(self) -> list[tuple[PatchEmbed, Size]]:
        """Return the patch embedding of each stage, and its grid."""
        return [(stage.patch_embed, grid) for stage, grid in zip(self.stages, self.grid_sizes, strict=True)]

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of the last stage after the final norm, the class token first."""
        size: Size | None = None
        for stage in self.stages:
            x, size = stage(x if size is None else image_of(x, size))
            x = self.run([partial(block, size=size) for block in stage.blocks], x)
        return self.norm(x)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the authors train without weight decay."""
        return {"stage2.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that order the layers, for layer-wise learning rates."""
        fine = [(r"^stage(\d)\.blocks\.(\d+)", None), (r"^stage(\d)", (-1,))]
        return {"stem": r"^stage0\.patch_embed", "blocks": r"^stage(\d)" if coarse else fine}


def checkpoint_filter(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of the authors' checkpoint, or of transformers' port, to the names of this model.

    Args:
        state: weights, possibly inside a training checkpoint or with the prefix ``module.``.
        model: the model to load them into.
    """
    return renamed(unwrap(state), PORTED)


_FACTS = imagenet(first_conv="stage0.patch_embed.proj", classifier="head", crop_pct=0.875, fixed_input_size=False)
default_cfgs = generate_default_cfgs({name: _FACTS for name in ("cvt_13", "cvt_21")})


def _create(name: str, pretrained: bool, depths: tuple[int, ...], options: dict[str, Any]) -> ConvolutionalVisionTransformer:
    options = {"depths": depths, "pretrained_filter_fn": checkpoint_filter, **options}
    return build_model_with_cfg(ConvolutionalVisionTransformer, name, pretrained, **options)


@register_model
def cvt_13(pretrained: bool = False, **kwargs: Any) -> ConvolutionalVisionTransformer:
    """CvT-13: 20.0 M parameters, 4.6 GMACs."""
    return _create("cvt_13", pretrained, (1, 2, 10), kwargs)


@register_model
def cvt_21(pretrained: bool = False, **kwargs: Any) -> ConvolutionalVisionTransformer:
    """CvT-21: 31.6 M parameters, 7.2 GMACs."""
    return _create("cvt_21", pretrained, (1, 4, 16), kwargs)
