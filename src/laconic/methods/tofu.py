"""ToFu: Token Fusion, bridging the gap between token pruning and token merging (Kim et al., WACV 2024, arXiv:2312.01026).

ToMe's matching, between attention and MLP: tokens at even positions of the sequence to tokens at odd positions, by the cosine
of their keys (mean over heads), the r best matches. In the early blocks the matched tokens are pruned, because a block that
is far from linear should not process averages; after ``switch`` of the depth they are merged, and the mean of a group
is scaled up (norm-preserving merging, MLERP), because averaging reduces the norm:

* ``norm="host"``: mean * (longest of the group / host), the published form, where the host is the token merged into;
* ``norm="mean"``: mean * (longest of the group / mean), so that the new token is as long as the longest of the group;
* ``norm="none"``: the mean.

Means are over tokens, not over patches, and sizes do not weight the attention. A keep rate removes r = floor(T - keep T) of T
tokens, one class token counted, at three blocks by default; ``ratio`` is the authors' setting, the same rate in every block.
Written from a description of a reproduction (the authors published no code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens
from laconic.methods.ops import Pairing, group_normalize, parity, require, soft_matching

Norm = Literal["host", "mean", "none"]


class ToFuReducer(Reducer):
    """Match tokens as ToMe does; prune the matched tokens, or merge them with preserved norm."""

    reads = "keys"

    def __init__(self, prune: bool, norm: Norm) -> None:
        super().__init__()
        self.prune, self.norm = prune, norm

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        dst, stay = soft_matching(seen.keys, *parity(tokens), len(tokens) - n)
        if self.prune:
            return tokens.keep(stay)
        before = _lengths(tokens)
        longest = torch.zeros_like(tokens.size[:, :n]).scatter_reduce(1, dst, before, "amax", include_self=False)
        tokens = tokens.merge(dst, group_normalize(torch.ones_like(tokens.size), dst, n, complete=True), stay, complete=True)
        if self.norm == "none":
            return tokens
        now = before.gather(1, stay) if self.norm == "host" else _lengths(tokens)
        factor = longest / now.clamp_min(torch.finfo(now.dtype).tiny)
        x = (tokens.x * F.pad(factor, (tokens.prefix, 0), value=1.0).unsqueeze(2)).to(tokens.x.dtype)
        return tokens.replace(x=x)


def _lengths(tokens: Tokens) -> Float[Tensor, "B L"]:
    return torch.linalg.vector_norm(tokens.patches.float(), dim=2)


@method(
    "tofu",
    title="ToFu: prune early, merge late",
    paper="2312.01026",
    phase="between",
    score="similarity",
    score_detail="key similarity",
    rest="dropped and merged",
    rest_detail="dropped early, merged late",
    trained=False,
)
@dataclass(frozen=True)
class ToFu(Pairing):
    """Options of ``tofu``: the depth where merging begins, the norm of a merged token, and the number of removed tokens.

    Args:
        switch: share of the depth up to which blocks prune; later blocks merge.
        norm: scaling of a merged token: the ``host`` form of the published code, the ``mean`` form (MLERP), or ``none``.
        ratio: the share of its tokens that every block keeps (for example 0.9). None: give a keep rate instead.
        spread: see `Pairing`.
    """

    switch: float = 0.5
    norm: Norm = "host"
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("tofu", "switch", self.switch, 0 <= self.switch <= 1, "is a share of the depth, from 0 to 1")

    def build(self, site: BlockContext) -> Reducer:
        return ToFuReducer(site.block <= self.switch * max(site.depth, 1), self.norm)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.ratio is None:
            return super().default_schedule(depth, keep, at)
        return self.in_every_block(self.ratio, depth, keep, at)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return max(n - math.floor(n + 1 - rates[-1] * (n + 1)), n - n // 2)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": (before // 2) * (before - before // 2) * (site.dim // site.heads)}
