"""PS-ViT (Yue et al., ICCV 2021, arXiv:2108.01684): patches are sampled at learned points, not cut along a grid.

A stem computes a feature map. In each of four rounds the model samples the map at a set of points, passes the samples through
a transformer layer, and moves every point by a predicted offset. Then a class token is added, and plain layers follow; these
are ``blocks``, whose tokens Laconic reduces. Of the 14 layers of PS-ViT-B, four are rounds of sampling.
The authors' weights are linked on their GitHub page; load a file of them with
``timm.create_model("psvit_base_14", pretrained=True, pretrained_cfg_overlay=dict(file="ps_vit_b_14.pth.tar"))``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from laconic.models.block import Block, imagenet, init_linear, rates, unwrap
from laconic.models.sampling import ProgressiveSampling

POOLINGS = ("token", "avg")


class PSViT(nn.Module):
    """PS-ViT, with the interface of a timm model.

    A grid of ``grid_size`` points is sampled ``rounds`` times; ``depth`` plain layers follow. Attention logits are scaled by
    ``scale``, by default C ** -0.5: the authors' weights were trained with the root of the width, not of the head
    dimension. ``block``: options of every `Block`, such as ``qkv_bias``.
    """

    head: nn.Module
    global_pool: str

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 10,
        num_heads: int = 6,
        grid_size: int | Sequence[int] = 14,
        rounds: int = 4,
        stem_width: int = 256,
        *,
        scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **block: Any,
    ) -> None:
        super().__init__()
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1: without sampling there are no tokens; got {rounds}")
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing = 1, False
        block["scale"] = embed_dim**-0.5 if scale is None else scale
        layers = [Block(embed_dim, num_heads, drop_path=rate, **block) for rate in rates(drop_path_rate, rounds + depth)]
        self.patch_embed = ProgressiveSampling(img_size, grid_size, in_chans, embed_dim, stem_width, layers[:rounds])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.Sequential(*layers[rounds:])
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        self.patch_embed.stay()  # the first step of training samples a regular grid

    # -------------------------------------------------------------------------------------------- forward
    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to tokens [B, 1 + P, C] after the final norm, patch tokens in raster order."""
        sampled = self.patch_embed(x)
        # the authors order points column by column; the blocks do not depend on the order, and token maps need raster order
        rows, columns = self.patch_embed.grid_size
        sampled = sampled.unflatten(1, (columns, rows)).transpose(1, 2).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(sampled.shape[0], -1, -1), sampled], 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens [B, N, C] to logits [B, K], or to the pooled features [B, C]."""
        x = self.head_drop(self.pool(x))
        out: Tensor = x if pre_logits else self.head(x)
        return out

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens [B, N, C] to [B, C]: the class token, or the mean patch token."""
        kind = self.global_pool if pool_type is None else pool_type
        return x[:, 0] if kind == "token" else x[:, 1:].mean(1)

    # -------------------------------------------------------------------------------------------- timm interface
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` classes.

        Raises:
            ValueError: ``global_pool`` is unknown.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLINGS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))} for PS-ViT, not {pool!r}")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        init_linear(self.head)
        self.head.to(self.cls_token.device, self.cls_token.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the plain layers in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are trained without weight decay."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that assign parameters to layers, for layer-wise learning rates."""
        return {"stem": r"^cls_token|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


# the authors' names -> our names; their checkpoints repeat the position layer in every round
RENAMED = (
    (r"(stem|pos_layer)\.", r"patch_embed.\1."),
    (r"ps_layers\.\d+\.position_layer\.", "patch_embed.pos_layer."),
    (r"ps_layers\.(\d+)\.transformer_layer\.", r"patch_embed.layers.\1."),
    (r"ps_layers\.(\d+)\.offset_layer\.", r"patch_embed.offsets.\1."),
    (r"trans_layers\.", "blocks."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PSViT) -> dict[str, Tensor]:
    """Return the authors' weights (or Laconic's) for ``model`` under the names of this model.

    Raises:
        ValueError: the weights are for another number of points.
    """
    weights = unwrap(state_dict)
    points, grid = weights.pop("point_coord", None), model.patch_embed.grid_size
    if points is not None and points.shape[-2] != grid[0] * grid[1]:
        raise ValueError(
            f"these weights sample {points.shape[-2]} points, but the model has a grid of {grid[0]} x {grid[1]}; use "
            "psvit_base_14, _16 or _18 (196, 256 or 324 points), or remove point_coord from the file to load the weights anyway"
        )
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in RENAMED:
            if re.match(theirs, name):
                name = re.sub(theirs, ours, name, count=1)
                break
        renamed[name] = tensor
    return renamed


_layers = {"first_conv": "patch_embed.stem.0", "classifier": "head"}
NAMES = ("psvit_tiny_14", "psvit_base_14", "psvit_base_16", "psvit_base_18")
default_cfgs = generate_default_cfgs({name: imagenet(**_layers) for name in NAMES})


def _create(name: str, pretrained: bool, sizes: dict[str, Any], **options: Any) -> PSViT:
    return build_model_with_cfg(PSViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**sizes, **options})


@register_model
def psvit_tiny_14(pretrained: bool = False, **kwargs: Any) -> PSViT:
    """PS-ViT-Ti/14: 4.8 M parameters, 1.6 GMACs."""
    return _create("psvit_tiny_14", pretrained, {"embed_dim": 192, "depth": 8, "num_heads": 3, "stem_width": 192}, **kwargs)


@register_model
def psvit_base_14(pretrained: bool = False, **kwargs: Any) -> PSViT:
    """PS-ViT-B/14: 21.3 M parameters, 5.4 GMACs."""
    return _create("psvit_base_14", pretrained, {}, **kwargs)


@register_model
def psvit_base_16(pretrained: bool = False, **kwargs: Any) -> PSViT:
    """PS-ViT-B/16, 256 points: 21.3 M parameters, 6.9 GMACs."""
    return _create("psvit_base_16", pretrained, {"grid_size": 16}, **kwargs)


@register_model
def psvit_base_18(pretrained: bool = False, **kwargs: Any) -> PSViT:
    """PS-ViT-B/18, 324 points: 21.3 M parameters, 8.7 GMACs."""
    return _create("psvit_base_18", pretrained, {"grid_size": 18}, **kwargs)
