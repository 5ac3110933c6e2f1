"""ATC: Agglomerative Token Clustering (Haurum et al., ECCV 2024, arXiv:2409.11923).

Between attention and MLP, patch tokens are clustered bottom-up by 1 - cosine of their keys (mean over heads): the two nearest
clusters are merged until n are left. The distance of two clusters is the mean (``linkage="average"``), the largest
(``"complete"``) or the smallest (``"single"``) distance between their members. With proportional attention a cluster becomes
the mean of its tokens weighted by size, and the log of its size is added to every logit towards a token, from the next block
on (ToMe's eq. 1). Without it, sizes affect neither: a cluster is the plain mean of its tokens, as in the published code.

Departures: the published code calls a library for every image on the CPU; here all images are clustered at once, on any
device, one merge per step (see `laconic.methods.ops.agglomerate`). The published code returns the tokens in an arbitrary
order, here they are ordered by the first member of each cluster.

The clustering needs the distances of all pairs of tokens: O(N^2) memory and N - n steps, so it suits short sequences.
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
    """Cluster the keys agglomeratively and merge each cluster into one token."""

    def __init__(self, linkage: Literal["average", "complete", "single"], proportional: bool) -> None:
        super().__init__()
        self.linkage, self.proportional = linkage, proportional

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        distance = 1 - cosine(seen.keys, seen.keys)
        cluster = agglomerate(distance, n, self.linkage)
        # a cluster takes the position of its member nearest to all tokens, which does not depend on the order of the tokens
        lead = cheapest(distance.sum(2), cluster, n)
        if not self.proportional:
            equal = group_normalize(torch.ones_like(tokens.size), cluster, n, complete=True)
            return tokens.merge(cluster, equal, lead, complete=True)
        tokens = tokens.merge(cluster, None, lead, complete=True)
        return tokens.replace(attn_scale=tokens.size)


@method(
    "atc",
    title="ATC: merge clusters, bottom-up",
    paper="2409.11923",
    phase="between",
    score="similarity",
    score_detail="key similarity",
    rest="merged",
    rest_detail="merged by size",
    trained=False,
)
@dataclass(frozen=True)
class ATC(Method):
    """Options of ``atc``.

    Args:
        linkage: distance of two clusters: ``average``, ``complete`` or ``single`` linkage of their members.
        proportional: add log(size) to the attention logits towards a token, and weight means by size. Use it for models
            that were not trained with this method; turn it off for models that were trained without it.
    """

    linkage: Literal["average", "complete", "single"] = "average"
    proportional: bool = True

    def build(self, site: BlockContext) -> Reducer:
        return ATCReducer(self.linkage, self.proportional)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"matmul": before * before * (site.dim // site.heads)}
