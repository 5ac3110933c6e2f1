"""Rank, split and match tokens, and normalise weights inside groups."""

from __future__ import annotations

import torch
from torch import Tensor

from laconic.core.gather import add_rows, arange_like, first_least
from laconic.core.shape_types import Float, Int


def topk_split(score: Float[Tensor, "B L"], count: int) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B R"]]:
    """Return the indices of the ``count`` highest scores and of the rest, both by falling score."""
    order = score.detach().sort(dim=1, descending=True, stable=True).indices
    return order[:, :count], order[:, count:]


def scatter_back(kept: Tensor, rest: Tensor, of_kept: Tensor, of_rest: Tensor) -> Tensor:
    """Return the values of the kept and of the other tokens, in token order."""
    values = torch.cat([of_kept, of_rest], 1)
    return values.scatter(1, torch.cat([kept, rest], 1), values)


def length(x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L"]:
    """Return |x| + 1e-6."""
    return torch.linalg.vector_norm(x, dim=-1) + 1e-6


def cosine(x: Float[Tensor, "B M C"], y: Float[Tensor, "B K C"]) -> Float[Tensor, "B M K"]:
    """Return the cosine similarity of every x to every y, in float32, with lengths |x| + 1e-6."""
    x, y = x.float(), y.float()
    # the products have fewer elements than the features, so divide the products
    return torch.bmm(x, y.transpose(1, 2)) / length(x).unsqueeze(2) / length(y).unsqueeze(1)


def group_normalize(
    weight: Float[Tensor, "B L"], dst: Int[Tensor, "B L"], count: int, *, complete: bool = False
) -> Float[Tensor, "B L"]:
    """Return weights that sum to one inside every group (equal weights if all are zero); ``dst == -1`` is in no group.

    ``complete`` says that no ``dst`` is -1.
    """
    into, there, counted = dst, torch.ones_like(weight), weight
    if not complete:
        into, there = dst.clamp_min(0), (dst >= 0).to(weight.dtype)
        counted = weight * there
    whole, members = (add_rows(w, into, count).gather(1, into) for w in (counted, there))
    return torch.where(whole > 0, weight / whole.clamp_min(torch.finfo(weight.dtype).tiny), 1.0 / members.clamp_min(1.0))


def one_to_one(similarity: Float[Tensor, "B R"], host: Int[Tensor, "B R"], count: int) -> Int[Tensor, "B R"]:
    """Keep only the most similar row of each host (ties: the first); the other rows get -1."""
    closest = first_least(-similarity, host, count)
    return host.masked_fill(closest.gather(1, host) != arange_like(host), -1)


def bipartite(
    best: Float[Tensor, "B M"], match: Int[Tensor, "B M"], count: int
) -> tuple[Int[Tensor, "B Q"], Int[Tensor, "B R"], Int[Tensor, "B Q"]]:
    """Return (the ``count`` rows with the best matches, the other rows in their old order, the matches of the former)."""
    chosen, others = topk_split(best, count)
    return chosen, others.sort(1).values, match.gather(1, chosen)
