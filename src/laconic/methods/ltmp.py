"""LTMP: Learned Thresholds Token Merging and Pruning for Vision Transformers (Bonnaerens and Dambre, TMLR 2024,
arXiv:2307.10780).

Between attention and MLP, with two learned thresholds for each block. Tokens are split by the parity of their position in the
sequence, as in ToMe; a token of A merges into the token of B with the most similar key (mean over heads, cosine) if that
similarity is above the first threshold, as means weighted by size. Then tokens are dropped if the attention they receive (mean
over heads and queries) is not above the second threshold; for a merged token it is the most that a token of its group
receives. The log of its size is added to every logit towards a token. The unmerged tokens of A come first in the output, then
B; the next block splits them again.

* Inference: tokens are really removed, and the next block splits the remaining ones.
* Training, and ``execution="masked"``: removed tokens are hidden at their position; the next block splits the sequence with
  hidden tokens included, and hidden tokens still count as queries. Decisions are hard, with the gradients of
  sigmoid((value - threshold) / ``tau``). Loss "flops": (the share of the blocks' multiply-adds, mean over the batch -
  ``flops``)^2, which the paper adds to cross-entropy with weight 10, to train only the thresholds for one epoch.
  With keep rates, the target is the share that their counts would cost.

The two are different functions on purpose, as in the published code (logits differ by a few tenths with random weights):
``packed`` and ``padded`` agree with each other and not with ``masked``. Compiling and exporting use the first, unless
``masked`` is asked for. At inference the keep rate has no effect (but 1 switches a block off). Written from a description of
method and code alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from laconic.core.adaptive import AdaptiveMethod, AdaptiveReducer
from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.tokens import Tokens
from laconic.methods.ops import WORK, above, absorb, highest_given, matches, renamed, require, work_left, work_planned


class LTMPReducer(AdaptiveReducer):
    """Merge tokens whose similarity is above one threshold, prune tokens whose attention is not above the other."""

    def __init__(self, config: LTMP) -> None:
        super().__init__()
        self.config = config
        self.merging = nn.Parameter(torch.full((1,), config.merge))
        self.pruning = nn.Parameter(torch.full((1,), config.prune))

    def above(self, values: Tensor, threshold: Tensor) -> Tensor:
        """Return 1 where the values are above the threshold, else 0."""
        return above(values, threshold.float(), self.config.tau if self.training else None)

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        before, holes = tokens, self.training or self.config.execution == "masked"
        importance = seen.matrix.mean((1, 2))[:, tokens.prefix :] if holes else seen.received
        merges, into = matches(tokens, seen.keys, partial(self.above, threshold=self.merging))
        tokens = self.hide(absorb(tokens, merges, into), 1 - merges, into)
        tokens = self.hide(tokens, self.above(highest_given(importance, merges, into), self.pruning))
        if self.training:
            tokens = tokens.set_per_image(**{WORK: work_left(before, tokens, self.site)})
        rank = (arange_like(tokens.size) + tokens.prefix) % 2
        if tokens.keep_mask is not None and not holes:
            rank = rank + 2 * (tokens.keep_mask <= 0)
        return tokens.keep(rank.sort(dim=1, stable=True).indices)

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        schedule, aim = self.site.schedule, self.config.flops
        if WORK not in tokens.per_image or schedule is None or self.site.block != schedule.at[-1]:
            return {}
        if schedule.unit != "adaptive":
            counts = self.config.counts(schedule, self.site.depth, tokens.token_of_patch.shape[1])
            aim = work_planned(tokens, self.site, counts)
        return {"flops": (tokens.per_image[WORK].mean() - aim).square()}


@method(
    "ltmp",
    title="LTMP: learned thresholds for merging and pruning",
    paper="2307.10780",
    phase="between",
    score="similarity",
    score_detail="key similarity, attention received",
    rest="merged",
    rest_detail="merged by size, or dropped",
    trained=True,
    learns=True,
    count="variable",
    full_attention=True,
)
@dataclass(frozen=True)
class LTMP(AdaptiveMethod):
    """Options of ``ltmp``: the thresholds and their training, and those of `AdaptiveMethod`.

    Args:
        merge: initial threshold of similarity.
        prune: initial threshold of attention.
        tau: temperature of the gradients of a decision.
        flops: target share of the work in training.
    """

    merge: float = 0.9
    prune: float = 0.0
    tau: float = 0.1
    flops: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        require("ltmp", "tau", self.tau, self.tau > 0, "must be a temperature above 0")
        require("ltmp", "flops", self.flops, 0 < self.flops <= 1, "must be a share of the work, above 0 and up to 1")

    def build(self, site: BlockContext) -> Reducer:
        return LTMPReducer(self)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def loss_weights(self) -> Mapping[str, float]:
        """Return the published weight of the loss."""
        return {"flops": 10.0}

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        pairs = (before // 2) * (before - before // 2)
        return {"matmul": pairs * (site.dim // site.heads), "elementwise": before, "head_mean": before * before}

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        names = (("merge", "merging"), ("prune", "pruning"))
        return renamed(weights, *((rf"blocks\.(\d+)\.{a}_masker\.threshold", rf"laconic.reducers.\1.{b}") for a, b in names))
