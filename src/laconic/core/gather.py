"""Gather, remap and sum rows of batched tensors, each in one flat operation."""

from __future__ import annotations

import torch
from torch import Tensor

_exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7
# A matrix of similarities or distances of which only each row's best entry is needed is computed at once if it has at most
# WHOLE elements an image, otherwise ROWS rows at a time: memory is then linear in the number of tokens.
WHOLE = 1 << 20
ROWS = 256


def arange_like(like: Tensor) -> Tensor:
    """Return the indices 0 .. L-1 as [B, L], for a tensor [B, L, ...]."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)


def places(mask: Tensor, count: int) -> Tensor:
    """Return the indices of the first ``count`` true entries of each row of ``mask`` [B, L], in order (then of false ones).

    Not every runtime of exported files sorts stably, so equal keys are avoided.
    """
    own = arange_like(mask)
    return torch.where(mask, own, own + mask.shape[1]).sort(dim=1).values[:, :count] % mask.shape[1]


def remap(where: Tensor, dst: Tensor, *, complete: bool = False) -> Tensor:
    """Update the token of every patch: ``where`` [B, P] is the old one, ``dst`` [B, L] the new index of each old token.

    -1 marks dropped patches and dropped tokens; ``complete`` promises that no ``where`` is -1.
    """
    if complete:
        return dst.gather(1, where)
    return torch.where(where < 0, -1, dst.gather(1, where.clamp_min(0)))


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Gather rows ``index`` [B, K] of ``values`` [B, L, ...] by one flat index_select (much faster than an expanded gather)."""
    if values.dim() == 2:
        return values.gather(1, index)
    if values.shape[0] == 1 and not _exporting():  # one image needs no offsets: half the operations
        return values.index_select(1, index[0])
    start = torch.arange(values.shape[0], device=index.device).unsqueeze(1) * values.shape[1]
    return values.flatten(0, 1).index_select(0, (index + start).flatten()).reshape(*index.shape, *values.shape[2:])


def table_rows(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows ``index`` [B, L] of a rotary table [P, D], [H, P, D] or [B, H, P, D] (one for each image): [B, H, L, D]."""
    if table.dim() == 4:
        return gather_rows(table.transpose(1, 2), index).transpose(1, 2)
    return (table.unsqueeze(0) if table.dim() == 2 else table)[:, index].transpose(0, 1)


def in_parts(values: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split the rows of ``values`` [B, M, ...] so that a matrix [B, part, width] is small. The number of parts is static."""
    return (values,) if values.shape[1] * width <= WHOLE else torch.split(values, ROWS, 1)  # type: ignore[no-untyped-call]


def joined_parts(parts: list[Tensor]) -> Tensor:
    """Concatenate parts of rows, [B, m, ...] each; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def add_rows(values: Tensor, dst: Tensor, count: int, lead: Tensor | None = None) -> Tensor:
    """Sum the rows of ``values`` [B, L, C] or [B, L] into ``count`` rows by ``dst`` [B, L], deterministically.

    ``lead`` [B, count], a row of each sum (``dst[lead[m]] == m``), makes exported files faster.
    """
    batch, here = values.shape[0], values.device.type == "cpu" and not _exporting()
    if values.dim() == 2:
        if here:
            return values.new_zeros(batch, count).scatter_add(1, dst, values)
        return add_rows(values.unsqueeze(2), dst, count, lead).squeeze(2)
    if here and batch == 1:
        return values.new_zeros(1, count, values.shape[2]).index_add(1, dst[0], values)
    if here:
        start = torch.arange(batch, device=dst.device).unsqueeze(1) * count
        out = values.new_zeros(batch * count, values.shape[2])
        return out.index_add(0, (dst + start).flatten(), values.flatten(0, 1)).view(batch, count, -1)
    # index_add is atomic, hence not deterministic, on other devices, so a one-hot product replaces it there; in exported files
    # too, since index_add becomes a ScatterND with a reduction, which some runtimes ignore
    if lead is None or not _exporting():
        return _product(values, dst, count)
    # Most sums have one row: take a row of each, and let the product add the others, which are few. Not in eager mode, where
    # several times as many operations would be launched.
    first = gather_rows(values, lead)
    if count == values.shape[1]:
        return first
    others = places(torch.ones_like(dst).scatter(1, lead, 0) > 0, values.shape[1] - count)
    return first + _product(gather_rows(values, others), dst.gather(1, others), count)


def _product(values: Tensor, dst: Tensor, count: int) -> Tensor:
    """Sum rows as `add_rows` does, by a product with a one-hot matrix."""
    new, old = torch.arange(count, device=dst.device).unsqueeze(0), dst.unsqueeze(1)
    return torch.cat([(old == part.unsqueeze(2)).to(values.dtype) @ values for part in in_parts(new, dst.shape[1])], 1)


def first_least(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the row with the lowest value (ties: the first) of each of ``count`` groups, [B, count].

    ``values`` and ``group`` are [B, L]. A group without rows gets 0.
    """
    values, none = values.detach(), values.shape[1]
    least = values.new_full((values.shape[0], count), torch.inf).scatter_reduce(1, group, values, "amin")
    row = torch.where(values == least.gather(1, group), arange_like(values), none)
    first = torch.full_like(least, none, dtype=row.dtype).scatter_reduce(1, group, row, "amin")
    return first.masked_fill(first == none, 0)
