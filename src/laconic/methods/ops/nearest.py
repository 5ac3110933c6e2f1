"""The best match of every row, and the best pairs, with memory linear in the number of rows.

A small matrix of all similarities is computed at once, a large one some rows at a time (see `laconic.core.gather`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laconic.core.gather import arange_like, gather_rows, in_parts, joined_parts
from laconic.core.shape_types import Bool, Float, Int
from laconic.methods.ops.matching import cosine, length

NO_MATCH = -2.0  # below any cosine
WINDOW = 64  # number of pairs found from one list of candidates


def best_of_rows(
    rows: Tensor, width: int, similar: Callable[[Tensor], Tensor]
) -> tuple[Float[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Return the highest value of each row of a matrix and its column (ties: the first).

    ``similar`` computes the part [B, m, width] of the matrix for some of the ``rows`` [B, M, ...].
    """
    parts = in_parts(rows, width)
    if len(parts) == 1:
        whole = similar(rows).max(2)
        return whole.values, whole.indices
    best = [similar(part).max(2) for part in parts]
    return joined_parts([b.values for b in best]), joined_parts([b.indices for b in best])


def nearest(
    x: Float[Tensor, "B M C"], y: Float[Tensor, "B K C"], hidden: Bool[Tensor, "B K"] | None = None
) -> tuple[Float[Tensor, "B M"], Int[Tensor, "B M"]]:
    """Return each x's highest cosine to a y that is not ``hidden`` and its index (ties: the first), or `NO_MATCH`."""

    if hidden is None and len(in_parts(x, y.shape[1])) == 1:
        # the lengths of x do not change the order in a row, so only the maxima are divided by them
        x, y = x.float(), y.float()
        best = (torch.bmm(x, y.transpose(1, 2)) / length(y).unsqueeze(1)).max(2)
        return best.values / length(x), best.indices

    def similar(part: Tensor) -> Tensor:
        similarity = cosine(part, y)
        return similarity if hidden is None else similarity.masked_fill(hidden.unsqueeze(1), NO_MATCH)

    if len(in_parts(x, y.shape[1])) == 1 or not torch.is_grad_enabled():
        return best_of_rows(x, y.shape[1], similar)
    # backward would keep all parts in memory: find the matches without a gradient, and recompute only their cosines
    with torch.no_grad():
        found, match = best_of_rows(x, y.shape[1], similar)
    matched = gather_rows(y, match).float()
    value = (x.float() * matched).sum(-1) / length(x.float()) / length(matched)
    return torch.where(found > NO_MATCH, value, found), match


def greedy_pairs(x: Float[Tensor, "B K C"], count: int) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
    """Return the ``count`` most similar disjoint pairs (a before b): take the best pair, exclude both rows, repeat."""
    x = x.detach()
    return _from_all(x, count) if len(in_parts(x, x.shape[1])) == 1 else _from_lists(x, count)


def _from_all(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the pairs from the matrix of all similarities, which is updated in place."""
    place, image = torch.arange(x.shape[1], device=x.device), torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    similarity = cosine(x, x).masked_fill_(place <= place.unsqueeze(1), -math.inf)
    pairs: list[Tensor] = []
    for _ in range(count):
        first = similarity.amax(2).argmax(1, keepdim=True)
        second = similarity[image, first].squeeze(1).argmax(1, keepdim=True)
        both = torch.cat([first, second], 1)
        similarity[image, both] = -math.inf
        similarity.transpose(1, 2)[image, both] = -math.inf
        pairs.append(both)
    first, second = torch.stack(pairs, 2).unbind(1)
    return first, second


def _from_lists(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the same pairs as `_from_all`, from lists of each row's best partners.

    p - 1 pairs exclude 2 (p - 1) rows, so the p-th pair is among the 2 p - 1 best partners of its row, and lists of this
    length suffice for p pairs. For more than `WINDOW` pairs the lists are computed again from all similarities: from there on
    time grows faster than K^2, memory does not.
    """
    size = x.shape[1]
    excluded = torch.zeros_like(x[..., 0], dtype=torch.bool)
    first, second = [arange_like(x)[:, :0]], [arange_like(x)[:, :0]]
    for start in range(0, count, WINDOW):
        pairs = min(WINDOW, count - start)
        similarity, partner = _candidates(x, excluded, min(size, 2 * pairs - 1))
        for _ in range(pairs):
            best = similarity.flatten(1).argmax(1, keepdim=True)
            i, j = best // partner.shape[2], partner.flatten(1).gather(1, best)
            excluded = excluded.scatter(1, torch.cat([i, j], 1), True)
            out = excluded.unsqueeze(2) | (partner == i.unsqueeze(2)) | (partner == j.unsqueeze(2))
            similarity = similarity.masked_fill(out, -math.inf)
            first.append(i)
            second.append(j)
    return torch.cat(first, 1), torch.cat(second, 1)


def _candidates(x: Tensor, excluded: Tensor, count: int) -> tuple[Float[Tensor, "B K Q"], Int[Tensor, "B K Q"]]:
    """Return each row's most similar partners among the later rows that are not excluded, in order of rows."""
    similarity: list[Tensor] = []
    partner: list[Tensor] = []
    start = 0
    for part in in_parts(x, x.shape[1]):
        begin = min(start, x.shape[1] - count)  # partners come after their row, so rows before the part are not needed
        row, column = (torch.arange(b, e, device=x.device) for b, e in ((start, start + part.shape[1]), (begin, x.shape[1])))
        no = (column <= row.unsqueeze(1)) | excluded[:, begin:].unsqueeze(1) | excluded[:, row].unsqueeze(2)
        similar = cosine(part, x[:, begin:]).masked_fill(no, -math.inf)
        best = similar.topk(count, dim=2).indices.sort(2).values
        similarity.append(similar.gather(2, best))
        partner.append(best + begin)
        start += part.shape[1]
    return torch.cat(similarity, 1), torch.cat(partner, 1)
