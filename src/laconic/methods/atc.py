"""ATC: Agglomerative Token Clustering (Haurum et al., ECCV 2024, arXiv:2409.11923).

Between attention and MLP: patch tokens are clustered bottom-up by 1 - cosine of their keys (mean over heads), always
merging the two nearest clusters, until exactly n are left. Clusters are as near as their members are on average, at most
(``linkage="complete"``) or at least (``"single"``). With proportional attention a cluster becomes the mean of its
tokens weighted by size, and the log of its size is added to every logit towards a token, from the next block on (ToMe's
eq. 1). Without it sizes count in neither: a cluster is the plain mean of its tokens, as in the published code.

Departures: the published code calls a library for every image on the CPU, here all images are clustered at once, on any
device, one merge a step (see `laconic.methods.ops.agglomerate`). Their order of tokens is arbitrary, ours by first member.

It is defined by all pairs of tokens: memory O(N^2) and N - n steps over it, so it is for short sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from laconic.core.attention import AttentionView
from laconic.core.method import BlockContext, Method, Reducer, method
from laconic.core.schedule import of_the_initial
from laconic.core.tokens import Tokens
from laconic.methods.ops import agglomerate, cheapest, cosine, group_normalize


class ATCReducer(Reducer):
    """Merge the clusters of an agglomerative clustering of keys."""

    def __init__(self, linkage: Literal["average", "complete", "single"], proportional: bool) -> None:
        super().__init__()
        self.linkage, self.proportional = linkage, proportional

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        distance = 1 - cosine(seen.keys, seen.keys)
        cluster = agglomerate(distance, n, self.linkage)
        # a cluster stands in the place of its member nearest to all tokens, whatever their order
        lead = cheapest(distance.sum(2), cluster, n)
        if not self.proportional:
            return tokens.merge(cluster, group_normalize(torch.ones_like(tokens.size), cluster, n), lead)
        tokens = tokens.merge(cluster, None, lead, complete=True)
        return tokens.replace(attn_scale=tokens.size)


@method(
    "atc",
    title="ATC: merge clusters, bottom-up",
    paper="2409.11923",
    phase="between",
    score="key similarity",
    rest="merged by size",
    trained=False,
)
@dataclass(frozen=True)
class ATC(Method):
    """Options of ``atc``.

    Args:
        linkage: how far apart two clusters are: by the ``average``, ``complete`` or ``single`` linkage of their members.
        proportional: add log(size) to the attention towards a token, and weigh means by size (right off the shelf; after
            training without it, not).
    """

    linkage: Literal["average", "complete", "single"] = "average"
    proportional: bool = True

    def build(self, site: BlockContext) -> Reducer:
        return ATCReducer(self.linkage, self.proportional)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": before * before * (site.dim // site.heads)}
