"""PVT: Pyramid Vision Transformer, first version (Wang et al., ICCV 2021, arXiv:2102.12122), with the authors' parameter names.

Four stages; the first embeds 4 x 4 patches, the others 2 x 2. In the first three stages, keys and values come from a grid
downsampled by a strided convolution; the last is a plain vision transformer with a class token. Position embeddings are
resized (bilinear, as the authors do) for images of another size. Sizes, LayerNorm eps 1e-6 and biases were checked against
the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from laconic.analysis.layer_macs import Work, attention, layers
from laconic.core.backbone import StageSpec
from laconic.core.grid import GridMap, cells_of, image_of
from laconic.core.shape_types import Float
from laconic.models.block import imagenet, init_linear, rates, unwrap
from laconic.models.layouts import PVT as PORTED
from laconic.models.layouts import renamed
from laconic.models.pyramid import PatchEmbed, Pyramid, Size

EPS = 1e-6
LayerNorm = partial(nn.LayerNorm, eps=EPS)
STAGES = (1, 2, 3, 4)  # as in the parameter names
LATER = ("norm2", "mlp.fc1", "mlp.fc2")  # the layers of a block that run after attention
SMALLEST = 32  # pixels: smaller images give the last stage no patch


class Attention(nn.Module):
    """Attention from every token to all tokens or, with ``sr_ratio`` above 1, to the grid downsampled by that ratio."""

    def __init__(self, dim: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.sr_ratio = heads, dim // heads, sr_ratio
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B N C"], size: Size = (0, 0), grid: GridMap | None = None) -> Float[Tensor, "B N C"]:
        """Attend as described in `GridBlock`."""
        rows = x
        if self.sr_ratio > 1:
            full = x if grid is None else grid.fill(x)
            rows = self.norm(cells_of(self.sr(image_of(full, size))))
        q = self.q(x).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(rows).unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of the last stage: a plain pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), Attention(dim, heads, sr_ratio)
        self.norm2, self.mlp = LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Float[Tensor, "B N C"], **facts: Any) -> Float[Tensor, "B N C"]:
        """Run both residual halves; the keywords are passed to attention."""
        x = x + self.drop_path(self.attn(self.norm1(x), **facts))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def work(self, at_attention: int, at_mlp: int, shape: StageSpec) -> Work:
        """Return the work in a stage of this shape, for token counts at attention and at MLP (see `analysis.layer_macs`)."""
        smaller = self.attn.sr_ratio
        keys = at_attention if smaller == 1 else prod(side // smaller for side in shape.grid)
        rows = {**dict.fromkeys(("attn.kv", "attn.sr", "attn.norm"), keys), **dict.fromkeys(LATER, at_mlp)}
        return layers(self, lambda name: rows.get(name, at_attention)) + attention(self.attn, at_attention, keys)


class GridBlock(Block):
    """A block of the first three stages; its keys and values come from the full grid, not from the kept tokens alone.

    Keywords of its forward: ``size``, rows and columns of the full grid; ``grid``, the token that each cell shows, None if no
    tokens were removed. Queries, norms, projections and the MLP run on the kept tokens.
    """


class PyramidVisionTransformer(Pyramid):
    """PVT v1, with the interface of a timm model.

    Args:
        img_size: pixels of a side, or (height, width), that the position embeddings are for; other sizes run as well.
        in_chans: channels of the images.
        num_classes: classes, or 0 for no head.
        global_pool: ``token`` reads the class token, ``avg`` the mean of the patches of the last stage, ``""`` nothing.
        drop_path_rate: drop path rate of the last block; it grows linearly from 0 at the first.
        depths, embed_dims, num_heads, mlp_ratios, sr_ratios: one value for each of the four stages.

    Raises:
        ValueError: ``img_size`` is too small for four stages.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_path_rate: float = 0.0,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
    ) -> None:
        super().__init__(img_size, embed_dims[-1], num_classes, global_pool, EPS)
        if min(self.img_size) < SMALLEST:
            raise ValueError(f"PVT needs images of at least {SMALLEST} x {SMALLEST} pixels, img_size is {img_size!r}")
        drops = iter(rates(drop_path_rate, sum(depths)))
        channels = (in_chans, *embed_dims)
        for i, stage in enumerate(STAGES):
            kind, dim, patch = (GridBlock if sr_ratios[i] > 1 else Block), embed_dims[i], 4 if i == 0 else 2
            cells = prod(self.grid_size(stage)) + int(stage == STAGES[-1])
            blocks = [kind(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], next(drops)) for _ in range(depths[i])]
            self.add_module(f"patch_embed{stage}", PatchEmbed(channels[i], dim, patch, patch, 0, EPS))
            self.register_parameter(f"pos_embed{stage}", nn.Parameter(torch.zeros(1, cells, dim)))
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
        self.patch_embed.img_size = self.img_size  # timm reads the input size here
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.apply(init_linear)
        for table in (self.cls_token, *(getattr(self, f"pos_embed{stage}") for stage in STAGES)):
            trunc_normal_(table, std=0.02)

    @property
    def patch_embed(self) -> Any:
        """The patch embedding of the first stage, which takes the image."""
        return self.patch_embed1

    def grid_size(self, stage: int) -> Size:
        """Return the rows and columns of a stage (1 to 4) for images of the model's own size."""
        return self.img_size[0] // 2 ** (stage + 1), self.img_size[1] // 2 ** (stage + 1)

    def embeddings(self) -> list[tuple[PatchEmbed, Size]]:
        """Return the patch embedding of each stage, and its grid."""
        return [(getattr(self, f"patch_embed{stage}"), self.grid_size(stage)) for stage in STAGES]

    def embed(self, stage: int, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N D"], Size]:
        """Return the input tokens of a stage (1 to 4) and their grid; in the last stage the class token comes first."""
        x, size = getattr(self, f"patch_embed{stage}")(x)
        table, prefix = getattr(self, f"pos_embed{stage}"), int(stage == STAGES[-1])
        if prefix:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        if size != self.grid_size(stage):
            table = torch.cat([table[:, :prefix], resized(table[:, prefix:], self.grid_size(stage), size)], 1)
        return x + table, size

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of the last stage after the final norm, the class token first."""
        for stage in STAGES:
            x, size = self.embed(stage, x)
            blocks = getattr(self, f"block{stage}")
            calls = [partial(block, size=size) if isinstance(block, GridBlock) else block for block in blocks]
            x = self.run(calls, x)
            if stage != STAGES[-1]:
                x = image_of(x, size)
        return self.norm(x)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the authors train without weight decay."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that order the layers, for layer-wise learning rates."""
        fine = [(r"^block(\d)\.(\d+)", None), (r"^(?:patch|pos)_embed([2-4])", (-1,)), (r"^cls_token", (4, -1))]
        whole = [(r"^(?:block|patch_embed|pos_embed)(\d)", None), (r"^cls_token", (4,))]
        return {"stem": r"^(?:patch|pos)_embed1", "blocks": whole if coarse else fine}


def resized(table: Float[Tensor, "1 P C"], old: Size, new: Size) -> Float[Tensor, "1 Q C"]:
    """Resize position embeddings to another grid, bilinearly."""
    return table if old == new else cells_of(F.interpolate(image_of(table, old), new, mode="bilinear"))


def checkpoint_filter(state: Mapping[str, Any], model: PyramidVisionTransformer) -> dict[str, Tensor]:
    """Convert the authors' checkpoint, or one of transformers' port: rename the weights and resize the position embeddings.

    Args:
        state: weights, possibly inside a training checkpoint or with the prefix ``module.``.
        model: the model to load them into.

    Raises:
        ValueError: position embeddings that are not for a square grid.
    """
    weights = renamed(unwrap(state), PORTED)
    for layer in sorted(
        {name.rpartition("key.")[0] for name in weights if ".attn.key." in name}
    ):  # the port has separate keys and values
        for kind in ("weight", "bias"):
            weights[f"{layer}kv.{kind}"] = torch.cat([weights.pop(f"{layer}{part}.{kind}") for part in ("key", "value")])
    for stage in STAGES:
        name, prefix = f"pos_embed{stage}", int(stage == STAGES[-1])
        table = weights.get(name)
        if table is None or table.shape == getattr(model, name).shape:
            continue
        side = isqrt(table.shape[1] - prefix)
        if side * side != table.shape[1] - prefix:
            raise ValueError(f"{name} has {table.shape[1]} positions, expected a square grid; this is not a PVT checkpoint")
        grid = resized(table[:, prefix:], (side, side), model.grid_size(stage))
        weights[name] = torch.cat([table[:, :prefix], grid], 1)
    return weights


_FACTS = imagenet(first_conv="patch_embed1.proj", classifier="head", crop_pct=0.875, fixed_input_size=False)
default_cfgs = generate_default_cfgs({name: _FACTS for name in ("pvt_tiny", "pvt_small", "pvt_medium")})


def _create(name: str, pretrained: bool, depths: tuple[int, ...], options: dict[str, Any]) -> PyramidVisionTransformer:
    options = {"depths": depths, **options}
    return build_model_with_cfg(PyramidVisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter, **options)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-T: 13.2 M parameters, 1.9 GMACs."""
    return _create("pvt_tiny", pretrained, (2, 2, 2, 2), kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-S: 24.5 M parameters, 3.8 GMACs."""
    return _create("pvt_small", pretrained, (3, 4, 6, 3), kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """PVT-M: 44.2 M parameters, 6.7 GMACs."""
    return _create("pvt_medium", pretrained, (3, 4, 18, 3), kwargs)
