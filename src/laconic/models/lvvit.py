"""LV-ViT (Jiang et al., NeurIPS 2021, arXiv:2104.10858): a vision transformer whose patch tokens are labelled as well.

It differs from DeiT in three ways: a convolutional stem; residual branches divided by a constant; and a second head on the
patch tokens, whose highest logits are added to the class logits with weight 0.5. In a reduced model these are the highest
logits of the kept tokens. The authors' weights are on their GitHub page; load a file of them with
``timm.create_model("lvvit_small", pretrained=True, pretrained_cfg_overlay=dict(file="lvvit_s.pth.tar"))``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from laconic.models.block import Block, imagenet, init_linear, rates, unwrap
from laconic.models.mixtoken import Box, Dense
from laconic.models.stems import Stem

POOLINGS = ("max", "token", "avg")
TOKENS_COUNT = 0.5  # weight of the highest token logits; the class token's logits have weight 1


class LVViT(nn.Module):
    """LV-ViT, with the interface of a timm model.

    ``global_pool``: ``max`` returns head(class token) + 0.5 * max over patch tokens of aux_head(patch token), for each class;
    ``token`` and ``avg`` use ``head`` alone, on the class token or the mean patch token. With ``return_dense`` the output
    in training is a `Dense`; ``mix_token`` above 0 is then the parameter of MixToken's Beta distribution (the authors use 1).
    ``block``: options of every `Block`, such as ``qkv_bias`` and ``divisor``.
    """

    head: nn.Module
    aux_head: nn.Module
    global_pool: str

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "max",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        stem_width: int = 64,
        *,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mix_token: float = 0.0,
        return_dense: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        if mix_token and not return_dense:
            raise ValueError(
                "mix_token mixes the images of a batch, and the loss needs the mixed region: set return_dense=True"
            )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.grad_checkpointing = 1, False
        self.return_dense, self.mix_token = return_dense, mix_token
        self.patch_embed = Stem(img_size, in_chans, embed_dim, stem_width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.patch_embed.grid_size), embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        paths = rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, drop_path=rate, **block) for rate in paths))
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for table in (self.cls_token, self.pos_embed):
            trunc_normal_(table, std=0.02)
        self.apply(init_linear)

    # -------------------------------------------------------------------------------------------- forward
    def forward(self, x: Tensor) -> Tensor | Dense:
        """Map images [B, 3, H, W] to logits [B, K]; in training with ``return_dense`` to a `Dense`."""
        if self.training and self.return_dense:
            return self.forward_dense(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, box: Box | None = None) -> Tensor:
        """Map images [B, 3, H, W] to tokens [B, 1 + P, C] after the final norm; ``box`` mixes the images' patch tokens."""
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        if box is not None:
            patches = box.exchange(patches, self.patch_embed.grid_size)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        x = self.pos_drop(x + self.pos_embed)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens [B, N, C] to logits [B, K], or to the pooled features [B, C]. Only `pool` selects tokens."""
        if pre_logits or not self.num_classes:
            return self.pool(x, "token" if self.global_pool == "max" else None)
        x = self.head_drop(x)
        if self.global_pool == "max":
            return self.pool(torch.cat([self.head(x[:, :1]), self.aux_head(x[:, 1:])], 1))
        out: Tensor = self.head(self.pool(x))
        return out

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens [B, N, C] to [B, C]. ``max`` takes the tokens' logits [B, N, K] instead, see `combine`."""
        kind = self.global_pool if pool_type is None else pool_type
        if kind == "max":
            return self.combine(x[:, 0], x[:, 1:])
        return x[:, 0] if kind == "token" else x[:, 1:].mean(1)

    def combine(self, logits: Tensor, token_logits: Tensor, alive: Tensor | None = None) -> Tensor:
        """Return class logits [B, K] + 0.5 * the maximum of the token logits [B, L, K] over tokens, for each class.

        Tokens with 0 in ``alive`` [B, L] or with logits of -inf are ignored; without any token the result is the class
        logits.
        """
        if alive is not None:
            token_logits = token_logits.masked_fill((alive <= 0).unsqueeze(-1), -torch.inf)
        if not token_logits.shape[1]:
            return logits
        highest = token_logits.amax(1)
        return logits + TOKENS_COUNT * highest.masked_fill(highest.isneginf(), 0.0)

    def forward_dense(self, x: Tensor) -> Dense:
        """Map images [B, 3, H, W] to the logits that the losses need; MixToken mixes the images if ``mix_token`` is above 0.

        Raises:
            ValueError: images were mixed and patch tokens were removed, so that the mixing cannot be undone.
        """
        grid = self.patch_embed.grid_size
        box = Box.random(grid, self.mix_token) if self.mix_token else Box()
        x = self.head_drop(self.forward_features(x, box if self.mix_token else None))
        token_logits = self.aux_head(x[:, 1:])
        if self.mix_token:
            if token_logits.shape[1] != math.prod(grid):
                raise ValueError(
                    f"MixToken is undone on all {math.prod(grid)} patch tokens, but a method kept {token_logits.shape[1]}; "
                    "train reduced models with mix_token=0"
                )
            token_logits = box.exchange(token_logits, grid)
        return Dense(self.head(x[:, 0]), token_logits, box)

    # -------------------------------------------------------------------------------------------- timm interface
    def get_classifier(self) -> nn.Module:
        """Return the head on the class token."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by new ones for ``num_classes`` classes.

        Raises:
            ValueError: ``global_pool`` is unknown.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLINGS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))} for LV-ViT, not {pool!r}")
        self.num_classes, self.global_pool = num_classes, pool
        like = self.pos_embed
        for name in ("head", "aux_head"):
            layer = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
            init_linear(layer)
            setattr(self, name, layer.to(like.device, like.dtype))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are trained without weight decay."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns that assign parameters to layers, for layer-wise learning rates."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LVViT) -> dict[str, Tensor]:
    """Return the authors' weights (or Laconic's) for ``model``, with position embeddings resized to its grid.

    They are resized as the authors do it: bicubic, without antialiasing.
    """
    weights = unwrap(state_dict)
    table = weights.get("pos_embed")
    if table is not None and table.shape != model.pos_embed.shape:
        grid = list(model.patch_embed.grid_size)
        weights["pos_embed"] = resample_abs_pos_embed(table, grid, num_prefix_tokens=1, antialias=False)
    return weights


_layers = {"first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head")}
default_cfgs = generate_default_cfgs(
    {
        "lvvit_tiny": imagenet(**_layers),
        "lvvit_small": imagenet(**_layers),
        "lvvit_medium": imagenet(**_layers, crop_pct=1.0),  # as in the authors' code; the others use 0.9
    }
)


def _create(name: str, pretrained: bool, sizes: dict[str, Any], **options: Any) -> LVViT:
    return build_model_with_cfg(LVViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**sizes, **options})


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.5 M parameters, 2.9 GMACs."""
    return _create("lvvit_tiny", pretrained, {"embed_dim": 240, "depth": 12, "num_heads": 4, "divisor": 1.0}, **kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26.2 M parameters, 6.6 GMACs."""
    return _create("lvvit_small", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 6, "divisor": 2.0}, **kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 55.8 M parameters, 12.7 GMACs."""
    return _create("lvvit_medium", pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8, "divisor": 2.0}, **kwargs)
