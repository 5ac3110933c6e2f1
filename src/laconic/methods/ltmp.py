"""LTMP: Learned Thresholds Token Merging and Pruning for Vision Transformers (Bonnaerens and Dambre, TMLR 2024,
arXiv:2307.10780).

Between attention and MLP, with two learned thresholds for each block. Tokens are parted by the parity of their place in the
sequence, as in ToMe; a token of A merges into the token of B with the most similar key (mean over heads, cosine) if that
similarity is above the one threshold, as means weighted by size. Then tokens leave that receive no more attention (mean
over heads and queries) than the other; a merged token counts with the most that one of its group receives. The log of its
size is added to every logit towards a token.

After a block the unmerged of A come first, then B, and the next block parts this sequence anew.

* Inference: tokens really leave, and the next block parts what is left.
* Training, and ``execution="masked"``: those that leave are hidden where they are; the next block parts the sequence with
  its holes, and hidden tokens still count as queries. Decisions are hard, with the gradients of
  sigmoid((value - threshold) / ``tau``). Loss "flops": (the share of the blocks' multiply-adds, mean over the batch -
  ``flops``)^2, which the paper adds to cross-entropy with weight 10, to train nothing but the thresholds for one epoch.
  With keep rates the share is what their counts would cost.

The two are different functions on purpose, as in the published code (logits differ by a few tenths with random weights):
``packed`` and ``padded`` agree with each other and not with ``masked``. What is compiled or exported is the first, unless
``masked`` is asked for.

Written from a description of method and code alone. A keep rate decides nothing at inference (but 1 switches a block off).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from laconic.attention import Seen
from laconic.deciding import Deciding, DecidingReducer
from laconic.parts import by_parity, cosine
from laconic.reducer import Reducer, Site, method
from laconic.rows import add_rows, iota, take
from laconic.schedule import Schedule
from laconic.tokens import Tokens

WORK = "share of the work"
Count = TypeVar("Count", int, Tensor)
KINDS = (("merge", "merging"), ("prune", "pruning"))


class LTMPReducer(DecidingReducer):
    """Merge what is alike, prune what is overlooked, as far as the thresholds say."""

    def __init__(self, config: LTMP) -> None:
        super().__init__()
        self.config = config
        self.merging = nn.Parameter(torch.full((1,), config.merge))
        self.pruning = nn.Parameter(torch.full((1,), config.prune))

    def between(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        holes = self.training or self.config.execution == "masked"
        before, importance = tokens, seen.matrix.mean((1, 2))[:, tokens.prefix :] if holes else seen.received
        merges, into = self.matches(tokens, seen)
        gate = tokens.gates
        # what each token gets of others: sizes, and features times sizes
        given, rows = merges * gate, tokens.patches.float()
        size = add_rows(given.unsqueeze(2), into, len(tokens))
        new = rows + (add_rows(rows * given.unsqueeze(2), into, len(tokens)) - rows * size) / (gate.unsqueeze(2) + size)
        x = torch.cat([tokens.x[:, : tokens.prefix], new.to(tokens.x.dtype)], 1)
        offered = importance.masked_fill(merges == 0, -torch.inf)
        importance = importance.scatter_reduce(1, into, offered, "amax")
        tokens = self.leave(tokens.replace(x=x, gate=gate + size.squeeze(2)), 1 - merges, into)
        tokens = self.leave(tokens, self.above(importance, self.pruning))
        if self.training:
            tokens = tokens.note(**{WORK: self.work(before, tokens)})
        rank = (iota(tokens.size) + tokens.prefix) % 2
        if tokens.alive is not None and not holes:
            rank = rank + 2 * (tokens.alive <= 0)
        return tokens.keep(rank.sort(dim=1, stable=True).indices)

    def matches(self, tokens: Tokens, seen: Seen) -> tuple[Tensor, Tensor]:
        """Who merges (1 or 0), and into which token; those that do not, into themselves. [B, L] each."""
        none, alone, (a, b) = torch.zeros_like(tokens.size), iota(tokens.size), by_parity(tokens)
        there = torch.ones_like(none) if tokens.alive is None else tokens.alive.detach()
        if not a.shape[1] or not b.shape[1]:
            return none, alone
        hidden = there.gather(1, b).unsqueeze(1) <= 0
        best, match = cosine(take(seen.keys, a), take(seen.keys, b)).masked_fill(hidden, -2.0).max(2)
        candidates = (best > -2).to(none.dtype) * (there.gather(1, a) > 0)
        merges = self.above(best, self.merging) * candidates
        return none.scatter(1, a, merges), alone.scatter(1, a, b.gather(1, match))

    def above(self, values: Tensor, threshold: Tensor) -> Tensor:
        """1 where the values are above the threshold, else 0."""
        threshold = threshold.float()
        hard = (values > threshold).to(values.dtype)
        if not self.training:
            return hard
        soft = ((values - threshold) / self.config.tau).sigmoid()
        return hard + (soft - soft.detach())

    def work(self, before: Tokens, after: Tokens) -> Tensor:
        """The share of the whole model's work, if no token leaves after this block, [B]."""
        rest, dim = self.site.depth - 1 - self.site.block, self.site.dim
        old, new = (before.prefix + present(tokens) for tokens in (before, after))
        saved = cost(old, old, dim) * (rest + 1) - cost(old, new, dim) - cost(new, new, dim) * rest
        whole = before.prefix + before.where.shape[1]
        return before.notes.get(WORK, torch.ones_like(saved)) - saved / (self.site.depth * cost(whole, whole, dim))

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        schedule = self.site.schedule
        if WORK not in tokens.notes or schedule is None or self.site.block != schedule.at[-1]:
            return {}
        return {"flops": (tokens.notes[WORK].mean() - self.config.target(schedule, self.site, tokens)).square()}


def present(tokens: Tokens) -> Tensor:
    """How many patch tokens there are, [B]."""
    return tokens.there.sum(1)


def cost(attended: Count, passed: Count, dim: int) -> Count:
    """Multiply-adds of a block over its width, with so many tokens at its attention and at its (four times wider) MLP."""
    return 4 * dim * attended + 2 * attended**2 + 8 * dim * passed


@method(
    "ltmp",
    title="LTMP: learned thresholds for merging and pruning",
    paper="2307.10780",
    moment="between",
    score="key similarity, attention received",
    rest="merged by size, or dropped",
    trained=True,
    learns=True,
    count="variable",
    full_attention=True,
)
@dataclass(frozen=True)
class LTMP(Deciding):
    """Options of ``ltmp``: the thresholds and how they are trained, and those of `Deciding`.

    Args:
        merge: threshold of similarity that training starts from.
        prune: threshold of attention that training starts from.
        tau: temperature of the gradients of a decision.
        flops: share of the work that training aims at.
    """

    merge: float = 0.9
    prune: float = 0.0
    tau: float = 0.1
    flops: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"ltmp: tau is a temperature, above 0, not {self.tau!r}")
        if not 0 < self.flops <= 1:
            raise ValueError(f"ltmp: flops is a share of the work, above 0 and up to 1, not {self.flops!r}")

    def build(self, site: Site) -> Reducer:
        return LTMPReducer(self)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """All."""
        return tuple(range(depth))

    def loss_weights(self) -> Mapping[str, float]:
        """As published."""
        return {"flops": 10.0}

    def target(self, schedule: Schedule, site: Site, tokens: Tokens) -> float:
        """The share of the work to aim at: ``flops``, or what the counts of a schedule would cost."""
        if schedule.unit == "decide":
            return self.flops
        patches = tokens.where.shape[1]
        counts = [tokens.prefix + n for n in (patches, *self.counts(schedule, site.depth, patches))]
        planned = sum(cost(before, after, site.dim) for before, after in pairwise(counts))
        return float(planned / (site.depth * cost(counts[0], counts[0], site.dim)))

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        pairs = (before // 2) * (before - before // 2)
        return {"matmul": pairs * (site.dim // site.heads), "elementwise": before, "head_mean": before * before}

    def official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        names = {f"blocks.{i}.{kind}_masker.threshold": f"laconic.reducers.{i}.{ours}" for i in at for kind, ours in KINDS}
        return {names.get(name, name): tensor for name, tensor in weights.items()}
