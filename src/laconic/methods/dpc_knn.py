"""DPC-KNN: density-peak clustering of tokens, as in TCFormer's CTM block (Zeng et al., CVPR 2022, arXiv:2204.08680).

Implemented as a baseline of Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers"
(ICCV Workshops 2023, arXiv:2308.04657). Before the block, on patch tokens only and with D_ij = |x_i - x_j| / sqrt(C):

    density  rho_i   = exp(-(mean of the k smallest D_ij^2, its own among them))
    distance delta_i = the smallest D_ij to a denser j; for the densest, the largest D of the image

The n tokens of largest rho_i delta_i are the centres, and are returned in that order; every other token joins the nearest
centre. A cluster becomes the sum of e^{s_i} x_i over the sum of e^{s_i}, s_i = Linear(x_i) (``weights="learned"``), or its
mean.

Departures: the published code adds noise of 1e-6 to the densities, in evaluation too; here the earlier of two equally
dense tokens counts as denser. Its denominators include 1e-6; here the weights of a cluster sum to one. Its scorer starts at
random (std 0.02); here it starts at zero, that is with equal weights, so that the method is usable before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.ops import by_stage, density_peaks, group_normalize, precise


class DPCKNNReducer(Reducer):
    """Cluster tokens by density peaks and merge each cluster, with learned weights if there is a scorer."""

    def __init__(self, score: nn.Linear | None, neighbours: int) -> None:
        super().__init__()
        self.score, self.neighbours = score, neighbours

    def before(self, tokens: Tokens, n: int) -> Tokens:
        x = precise(tokens.patches.detach())  # densities are close: float32 would change the order of some centres
        cluster, centres = density_peaks(x, n, assign="nearest", farthest="sample", neighbours=self.neighbours)
        weight = group_normalize(self.weight(tokens, cluster, n), cluster, n, complete=True)
        return tokens.merge(cluster, weight, centres, complete=True)

    def weight(self, tokens: Tokens, cluster: Tensor, n: int) -> Tensor:
        """Return e^{s_i} divided by the largest of the cluster (which cancels, and avoids overflow)."""
        if self.score is None:
            return torch.ones_like(tokens.size)
        score = self.score(tokens.patches.to(self.score.weight.dtype)).squeeze(-1).float()
        peak = score.new_full((score.shape[0], n), -torch.inf).scatter_reduce(1, cluster, score.detach(), "amax")
        return (score - peak.gather(1, cluster)).exp()


@method(
    "dpc-knn",
    title="DPC-KNN: merge density-peak clusters",
    paper="2308.04657",
    phase="before",
    score="features",
    score_detail="density and distance",
    rest="merged",
    rest_detail="merged into the nearest density peak",
    trained=False,
    learns=True,
)
@dataclass(frozen=True)
class DPCKNN(Method):
    """Options of ``dpc-knn``.

    Args:
        weights: weights of the tokens in a cluster: ``learned`` by a linear layer, or ``equal`` (no parameters).
        neighbours: k, the number of nearest tokens used for the density, including the token itself.
    """

    weights: Literal["learned", "equal"] = "learned"
    neighbours: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise ValueError(f"dpc-knn: neighbours must be at least 1, not {self.neighbours!r}")

    def build(self, site: BlockContext) -> Reducer:
        score = None
        if self.weights == "learned":
            score = nn.Linear(site.dim, 1)
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)
        return DPCKNNReducer(score, self.neighbours)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        learned = before * site.dim if self.weights == "learned" else 0
        return {"matmul": learned, "pairwise": before * before * site.dim, "elementwise": before * site.dim}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        return by_stage(weights, at)
