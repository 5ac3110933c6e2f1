"""The transformer block of LV-ViT and PS-ViT, its initialization, and helpers to read their authors' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_  # type: ignore[attr-defined]
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with fused q, k, v. By default the logits are divided by the root of the head dimension."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads; got {dim} and {num_heads}")
        self.num_heads, self.head_dim, self.attn_drop = num_heads, dim // num_heads, attn_drop
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C] with one call of fused attention."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        out: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, dim)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block. Both residual branches are divided by ``divisor`` (the paper's residual scale).

    ``options`` are passed to `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 3.0,
        divisor: float = 1.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.divisor = divisor
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, proj_drop=proj_drop, **options)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.divisor
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.divisor


def init_linear(module: nn.Module) -> None:
    """Initialize a linear layer as both papers do: weights from a truncated normal of deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rates(highest: float, layers: int) -> list[float]:
    """Return the drop path rate of each layer, growing linearly from 0 to ``highest``."""
    return [highest * i / max(1, layers - 1) for i in range(layers)]


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a loaded checkpoint, without a ``module.`` prefix; averaged (EMA) weights come first."""
    names = ("state_dict_ema", "model_ema", "state_dict", "model")
    weights = next((content[name] for name in names if isinstance(content.get(name), Mapping)), content)
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def imagenet(**changes: Any) -> dict[str, Any]:
    """Return timm's settings for an ImageNet model without a download URL; ``changes`` override single settings."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        **changes,
    }
