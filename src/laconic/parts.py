"""Steps that more than one method takes: rank, match, share out, cluster, score. Plain functions of tensors and one module.

All of it runs in float32 and outside autocast (see `laconic.attach`). Ties go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.attention import Seen
from laconic.shapes import Float, Int
from laconic.tokens import Tokens, add_rows, iota, take

Score = Callable[[Tokens, "Seen"], Tensor]
ScoreName = Literal["class", "mean-query"]


# ---------------------------------------------------------------------------------------------------- scores
def class_attention(tokens: Tokens, seen: Seen) -> Float[Tensor, "B L"]:
    """Mean over heads of the class token's attention (EViT sec. 3.2; BAT eq. 5)."""
    return seen.cls


def mean_query_attention(tokens: Tokens, seen: Seen) -> Float[Tensor, "B L"]:
    """Attention of the mean patch query: the stand-in on hosts without a class token."""
    return seen.mean_query


SCORES: dict[str, Score] = {"class": class_attention, "mean-query": mean_query_attention}


def arbitrary(tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """A score that says nothing: one fixed pseudo-random number for every patch position.

    The same for every image, so that no image depends on its batch-mates and a run can be repeated; draw again by
    changing ``seed``.
    """
    # an integer hash (xorshift-multiply) of position and seed: needs no generator, so it compiles and exports
    h = (tokens.place + (seed + 1) * 0x9E3779B1) & 0x7FFFFFFF
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x3C6EF35):
        h = ((h ^ (h >> 15)) * multiplier) & 0x7FFFFFFF
    return h.float() / 0x7FFFFFFF


def shuffled(score: Float[Tensor, "B L"], tokens: Tokens, seed: int) -> Float[Tensor, "B L"]:
    """The same scores for other tokens (the random policy of the TPS paper), by a fixed draw for every place and seed."""
    return score.gather(1, arbitrary(tokens, seed).argsort(dim=1, stable=True))


# ---------------------------------------------------------------------------------------------------- ranking, matching
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


# ---------------------------------------------------------------------------------------------------- clustering
def squared_distances(x: Float[Tensor, "B M C"]) -> Float[Tensor, "B M M"]:
    """|x_i - x_j|^2, from the centred rows (less cancellation), with an exact zero diagonal."""
    x = x.float() - x.float().mean(1, keepdim=True)
    norm = x.square().sum(-1)
    d2 = torch.baddbmm(norm.unsqueeze(1) + norm.unsqueeze(2), x, x.transpose(1, 2), alpha=-2.0).clamp_min(0.0)
    return d2.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), 0.0)


def density_peaks(
    x: Float[Tensor, "B M C"],
    count: int,
    density: Literal["knn", "paper"] = "knn",
    assign: Literal["denser", "nearest"] = "denser",
    farthest: Literal["own", "sample"] = "own",
    neighbours: int = 5,
) -> tuple[Int[Tensor, "B M"], Int[Tensor, "B Q"]]:
    """Density-peak clustering (Rodriguez and Laio 2014; BAT eqs. 6 and 7): the cluster of each row, and the centres.

    Density, as its logarithm (exp underflows): minus the mean squared distance to the nearest rows, itself included,
    over C (``knn``), or minus the sum of squared distances to all rows (``paper``, eq. 6). Distance to the nearest
    denser row; for the densest the largest distance, of its own row or in the whole sample. Centres are the ``count``
    largest products; a row joins the nearest centre that is denser than it (``denser``) or just the nearest.
    Of two rows of equal density the earlier counts as denser.
    """
    d2 = squared_distances(x.detach())
    if density == "knn":
        near = d2.topk(min(neighbours, x.shape[1]), dim=2, largest=False).values
        log_density = -near.mean(2) / x.shape[2]
    else:
        log_density = -d2.sum(2)
    mine, other, order = log_density.unsqueeze(2), log_density.unsqueeze(1), iota(log_density)
    denser = (other > mine) | ((other == mine) & (order.unsqueeze(1) < order.unsqueeze(2)))  # [B, i, j]: j denser than i
    distance = d2.sqrt()
    gap = distance.masked_fill(~denser, math.inf).amin(2)
    widest = distance.amax(2) if farthest == "own" else distance.amax((1, 2)).unsqueeze(1).expand_as(gap)
    gap = torch.where(denser.any(2), gap, widest)
    centres, _ = split(log_density + gap.log(), count)
    to_centre = take(distance, centres).transpose(1, 2)  # [B, M, count]
    if assign == "denser":
        allowed = take(denser.transpose(1, 2), centres).transpose(1, 2)
        allowed = allowed | ~allowed.any(2, keepdim=True)  # nothing denser among the centres: the nearest of all
        to_centre = to_centre.masked_fill(~allowed, math.inf)
    cluster = to_centre.argmin(2)
    return cluster.scatter(1, centres, iota(centres)), centres


# ---------------------------------------------------------------------------------------------------- learned scores
class Predictor(nn.Module):
    """DynamicViT's scorer (sec. 3.2, eqs. 1-4): local and global features of each token to two log-probabilities.

    Channel 0 is keep, 1 is drop. 1.625 C^2 + 4.25 C + 2 parameters.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # LayerNorm has torch's own eps of 1e-5 here, not the backbone's 1e-6
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "B L C"], alive: Float[Tensor, "B L"] | None = None) -> Float[Tensor, "B L 2"]:
        """Log-probabilities of keeping and of dropping each token; the global half averages over ``alive`` ones."""
        local, whole = self.in_conv(x.to(next(self.parameters()).dtype)).chunk(2, dim=-1)
        if alive is None:
            whole = whole.mean(1, keepdim=True)
        else:
            alive = alive.unsqueeze(-1).to(whole.dtype)
            # the official code divides by zero when every token is dropped; the clamp changes no other value
            whole = (whole * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp_min(1e-6)
        return F.log_softmax(self.out_conv(torch.cat([local, whole.expand_as(local)], -1)).float(), dim=-1)


def gumbel_keep(log_probs: Float[Tensor, "B L 2"]) -> Float[Tensor, "B L"]:
    """A hard keep decision for each token by Gumbel softmax at temperature 1, with straight-through gradients."""
    return F.gumbel_softmax(log_probs, tau=1.0, hard=True)[..., 0]
