"""Rows of batched tensors: counted, followed, gathered and summed, each in one flat pass."""

from __future__ import annotations

import torch
from torch import Tensor

_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7
# A matrix of similarities or distances that only its rows' best entries are wanted of is made at once while it has no more
# than WHOLE elements an image, else ROWS rows at a time: memory is then linear in the number of tokens.
WHOLE = 1 << 20
ROWS = 256


def arange_like(like: Tensor) -> Tensor:
    """[B, L] of 0 .. L-1 for a tensor [B, L, ...]."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)


def remap(where: Tensor, dst: Tensor, *, complete: bool = False) -> Tensor:
    """Send every patch on: from the token that held it to where that token went. ``complete``: no ``where`` is -1."""
    if complete:
        return dst.gather(1, where)
    return torch.where(where < 0, -1, dst.gather(1, where.clamp_min(0)))


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, K] of ``values`` [B, L, ...], as one flat row gather (many times quicker than an expanded one)."""
    if values.dim() == 2:
        return values.gather(1, index)
    if values.shape[0] == 1 and not _exporting():  # one image needs no offsets: half the operations
        return values.index_select(1, index[0])
    start = torch.arange(values.shape[0], device=index.device).unsqueeze(1) * values.shape[1]
    return values.flatten(0, 1).index_select(0, (index + start).flatten()).reshape(*index.shape, *values.shape[2:])


def table_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, L] of a rotary table [P, D] or [H, P, D], or of one for each image [B, H, P, D]: [B, H, L, D]."""
    if table.dim() == 4:
        return gather_rows(table.transpose(1, 2), index).transpose(1, 2)
    return (table.unsqueeze(0) if table.dim() == 2 else table)[:, index].transpose(0, 1)


def in_parts(values: Tensor, width: int) -> tuple[Tensor, ...]:
    """The rows of ``values`` [B, M, ...] in parts, such that a matrix [B, part, width] is small. Their number is static."""
    return (values,) if values.shape[1] * width <= WHOLE else torch.split(values, ROWS, 1)  # type: ignore[no-untyped-call]


def joined_parts(parts: list[Tensor]) -> Tensor:
    """Parts of rows, [B, m, ...] each, as one tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def add_rows(values: Tensor, dst: Tensor, count: int) -> Tensor:
    """Sum the rows of ``values`` [B, L, C] or [B, L] into ``count`` rows by ``dst`` [B, L]; the same sum on every run."""
    batch, here = values.shape[0], values.device.type == "cpu" and not _exporting()
    if values.dim() == 2:
        if here:
            return values.new_zeros(batch, count).scatter_add(1, dst, values)
        return add_rows(values.unsqueeze(2), dst, count).squeeze(2)
    if here and batch == 1:
        return values.new_zeros(1, count, values.shape[2]).index_add(1, dst[0], values)
    if here:
        start = torch.arange(batch, device=dst.device).unsqueeze(1) * count
        out = values.new_zeros(batch * count, values.shape[2])
        return out.index_add(0, (dst + start).flatten(), values.flatten(0, 1)).view(batch, count, -1)
    # index_add is atomic, hence not repeatable, on other devices: there a one-hot product does the same; so it does in
    # exported files, where it would become a ScatterND with a reduction, which not every runtime heeds
    new, old = torch.arange(count, device=dst.device).unsqueeze(0), dst.unsqueeze(1)
    return torch.cat([(old == part.unsqueeze(2)).to(values.dtype) @ values for part in in_parts(new, dst.shape[1])], 1)


def first_least(values: Tensor, group: Tensor, count: int) -> Tensor:
    """The row of least value (ties: the first) of each of ``count`` groups: [B, count] of ``values`` and ``group`` [B, L].

    0 where a group has no row.
    """
    values, none = values.detach(), values.shape[1]
    least = values.new_full((values.shape[0], count), torch.inf).scatter_reduce(1, group, values, "amin")
    row = torch.where(values == least.gather(1, group), arange_like(values), none)
    first = torch.full_like(least, none, dtype=row.dtype).scatter_reduce(1, group, row, "amin")
    return first.masked_fill(first == none, 0)
