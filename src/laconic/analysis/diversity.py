"""The diversity of the tokens of an image (BAT eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from laconic.core.shape_types import Float

Norm = Literal["l1", "l1_induced", "linf_induced", "composite", "fro"]


def diversity_score(tokens: Float[Tensor, "B L C"], norm: Norm = "l1", relative: bool = True) -> Float[Tensor, B]:
    """Return r(Z) = min over z of ||Z - 1 z^T||, the distance of the tokens from all being equal.

    BAT (arXiv:2211.11315, eq. 4) says "l1 norm" and plots values between .68 and .92, which fits r(Z) / ||Z||.

    Args:
        tokens: patch tokens of each image, without the class token; BAT takes them right after the last reducing block.
        norm: ``l1`` sum of absolute entries; ``l1_induced`` largest column sum; ``linf_induced`` largest row sum;
            ``composite`` sqrt(l1_induced * linf_induced); ``fro`` Frobenius. z is the median of each channel, which is exact
            for the first two and an upper bound for the next two; for ``fro`` it is the mean, exact.
        relative: divide by the same norm of Z.

    Raises:
        ValueError: tokens are not [B, L, C], or the norm is unknown.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, _NORMS))}, not {norm!r}")
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be [B, L, C], got shape {tuple(tokens.shape)}")
    tokens = tokens.float()
    centre = tokens.mean(1, keepdim=True) if norm == "fro" else tokens.quantile(0.5, dim=1, keepdim=True)
    residual = _NORMS[norm](tokens - centre)
    if not relative:
        return residual
    return residual / _NORMS[norm](tokens).clamp_min(torch.finfo(tokens.dtype).tiny)


def _columns(z: Tensor) -> Tensor:
    return z.abs().sum(1).amax(1)


def _rows(z: Tensor) -> Tensor:
    return z.abs().sum(2).amax(1)


def _l1(z: Tensor) -> Tensor:
    return z.abs().sum((1, 2))


def _composite(z: Tensor) -> Tensor:
    return (_columns(z) * _rows(z)).sqrt()


def _frobenius(z: Tensor) -> Tensor:
    return z.square().sum((1, 2)).sqrt()


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": _l1,
    "l1_induced": _columns,
    "linf_induced": _rows,
    "composite": _composite,
    "fro": _frobenius,
}
