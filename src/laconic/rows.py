"""Rows of batched tensors: counted, followed, gathered and summed, each in one flat pass."""

from __future__ import annotations

import torch
from torch import Tensor

_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7


def iota(like: Tensor) -> Tensor:
    """[B, L] of 0 .. L-1 for a tensor [B, L, ...]."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)


def follow(where: Tensor, dst: Tensor) -> Tensor:
    """Send every patch on: from the token that held it to where that token went."""
    return torch.where(where < 0, -1, dst.gather(1, where.clamp_min(0)))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, K] of ``values`` [B, L, ...], as one flat row gather (many times quicker than an expanded one)."""
    start = torch.arange(values.shape[0], device=index.device).unsqueeze(1) * values.shape[1]
    return values.flatten(0, 1).index_select(0, (index + start).flatten()).reshape(*index.shape, *values.shape[2:])


def table_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, L] of a rotary table [P, D] or [H, P, D], or of one for each image [B, H, P, D]: [B, H, L, D]."""
    if table.dim() == 4:
        return take(table.transpose(1, 2), index).transpose(1, 2)
    return (table.unsqueeze(0) if table.dim() == 2 else table)[:, index].transpose(0, 1)


def add_rows(values: Tensor, dst: Tensor, count: int) -> Tensor:
    """Sum the rows of ``values`` [B, L, C] into ``count`` rows by ``dst`` [B, L]; the same sum on every run."""
    batch = values.shape[0]
    if values.device.type == "cpu" and not _exporting():
        start = torch.arange(batch, device=dst.device).unsqueeze(1) * count
        out = values.new_zeros(batch * count, values.shape[2])
        return out.index_add(0, (dst + start).flatten(), values.flatten(0, 1)).view(batch, count, -1)
    # index_add is atomic, hence not repeatable, on other devices: there a one-hot product does the same; so it does in
    # exported files, where it would become a ScatterND with a reduction, which not every runtime heeds
    chosen = dst.unsqueeze(1) == torch.arange(count, device=dst.device).view(1, count, 1)
    return chosen.to(values.dtype) @ values
