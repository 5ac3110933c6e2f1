"""Rank, split, match, pair and share out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laconic.rows import add_rows, iota
from laconic.shapes import Float, Int


def split(score: Float[Tensor, "B L"], count: int) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B R"]]:
    """Indices of the ``count`` highest scores and of the rest, both by falling score."""
    order = score.detach().sort(dim=1, descending=True, stable=True).indices
    return order[:, :count], order[:, count:]


def lay(kept: Tensor, rest: Tensor, of_kept: Tensor, of_rest: Tensor) -> Tensor:
    """Values of the kept and of the rest, laid back in token order."""
    values = torch.cat([of_kept, of_rest], 1)
    return torch.empty_like(values).scatter(1, torch.cat([kept, rest], 1), values)


def length(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L"]:
    """|x| + 1e-6."""
    return torch.linalg.vector_norm(x, dim=-1) + 1e-6


def cosine(x: Float[Tensor, "B M C"], y: Float[Tensor, "B K C"]) -> Float[Tensor, "B M K"]:
    """Cosine similarity of every x to every y, in float32, with lengths |x| + 1e-6."""
    x, y = x.float(), y.float()
    # the products are fewer than the features: divide those
    return x @ y.transpose(1, 2) / length(x).unsqueeze(2) / length(y).unsqueeze(1)


def share(weight: Float[Tensor, "B L"], dst: Int[Tensor, "B L"], count: int) -> Float[Tensor, "B L"]:
    """Weights that sum to one inside every group (an all-zero group is shared out evenly); ``dst == -1`` is left alone."""
    into = dst.clamp_min(0)

    def total(w: Tensor) -> Tensor:
        return add_rows(w.masked_fill(dst < 0, 0.0).unsqueeze(-1), into, count).squeeze(-1).gather(1, into)

    whole = total(weight)
    even = 1.0 / total(torch.ones_like(weight)).clamp_min(1.0)
    return torch.where(whole > 0, weight / whole.clamp_min(torch.finfo(weight.dtype).tiny), even)


def one_to_one(similarity: Float[Tensor, "B R"], host: Int[Tensor, "B R"], count: int) -> Int[Tensor, "B R"]:
    """Of all that chose the same host only the most similar keeps it (ties: the first); the others get -1."""
    rivals = host.unsqueeze(2) == host.unsqueeze(1)  # [B, R, R]: i and j chose the same host
    better = similarity.unsqueeze(1) > similarity.unsqueeze(2)
    first = (similarity.unsqueeze(1) == similarity.unsqueeze(2)) & (iota(host).unsqueeze(1) < iota(host).unsqueeze(2))
    return host.masked_fill((rivals & (better | first)).any(2), -1)


def greedy_pairs(x: Float[Tensor, "B K C"], count: int) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B Q"]]:
    """The ``count`` most similar disjoint pairs (a before b): take the best pair, strike both out, repeat."""
    size = x.shape[1]
    a, b = torch.triu_indices(size, size, 1, device=x.device)
    similarity = cosine(x, x).detach().flatten(1)[:, a * size + b]
    # a pair strikes out fewer than 2 * size others, so that many times count are enough to choose from
    enough = min(len(a), count * (2 * size - 3))
    best = similarity.topk(enough, dim=1).indices.sort(1).values
    similarity, a, b = similarity.gather(1, best), a[best], b[best]
    first, second = [a[:, :0]], [b[:, :0]]
    for _ in range(count):
        best = similarity.argmax(1, keepdim=True)
        i, j = a.gather(1, best), b.gather(1, best)
        similarity = similarity.masked_fill((a == i) | (a == j) | (b == i) | (b == j), -math.inf)
        first.append(i)
        second.append(j)
    return torch.cat(first, 1), torch.cat(second, 1)


def bipartite(
    similarity: Float[Tensor, "B M K"], count: int
) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B R"], Int[Tensor, "B Q"]]:
    """Of the rows, the ``count`` with the highest best match: (they, the other rows in their old order, their matches)."""
    best, match = similarity.detach().max(2)
    chosen, others = split(best, count)
    return chosen, others.sort(1).values, match.gather(1, chosen)
