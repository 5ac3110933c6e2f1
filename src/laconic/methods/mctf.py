"""MCTF: Multi-criteria Token Fusion with One-step-ahead Attention (Lee et al., CVPR 2024, arXiv:2403.10030).

At the input of a block, using the attention A that the block would compute of these tokens:

* Three criteria score a pair, each softened by a temperature, as the exponent 1 / tau: similarity (cos + 1) / 2 of the
  features; information (merging two tokens that receive little attention loses little: 1 / mean attention received, of
  both); and size (1 / patches, of both), the last two relative to their largest.
* Matching goes both ways. Of the tokens at even positions of the sequence, the r // 2 best matched merge into tokens at odd
  positions; then, of all tokens at odd positions (including what was merged into them), the remaining part of the r merge into
  remaining even tokens.
* A group becomes its mean weighted by attention received times size.
* One step ahead: the merged tokens keep the attention of the unmerged ones. In A, the columns of a group are summed and its
  rows are averaged by the same weights, and the block multiplies the result with the values of the merged tokens. Without it
  (``one_step_ahead=False``, the authors' ablation) the block runs on all its tokens, and they are merged at its output, by
  the attention that it has computed.

Sizes weight the attention (proportional attention). The output has the even tokens in order, then the odd ones by falling
score (in order, if matching goes ``one`` way).
At least `LEAST` patch tokens and the class token are kept. Published numbers are of models fine-tuned for 30 epochs with
`laconic.training.consistency`: two passes, of which the one that merges less teaches the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import gather_rows
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens
from laconic.methods.ops import Pairing, both_ways, by_parity, cosine, fuse, group_normalize, remove_schedule, require, soften

LEAST = 9
RECEIVED = "attention received in this block"  # per-token column [B, L]: mean over heads and queries
Direction = Literal["both", "one"]


class Fusion(Reducer):
    """Base of MCTF's reducers: match tokens in both directions by three criteria."""

    def __init__(self, tau: tuple[float, float, float], direction: Direction) -> None:
        super().__init__()
        self.tau, self.direction = tau, direction

    def groups(self, tokens: Tokens, received: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new token of each old one, its weight there, and the old token whose position each new one takes."""
        r, (a, b) = len(tokens) - n, by_parity(tokens)
        if r > len(tokens) // 2:
            raise ValueError(f"mctf can merge away at most half of the tokens of a block; got {r} of {len(tokens)}")
        forward = r // 2 if self.direction == "both" else r
        dst, lead = both_ways(self.score(tokens, received, a, b), a, b, forward, r - forward)
        return dst, group_normalize(received * tokens.size, dst, n, complete=True), lead

    def score(self, tokens: Tokens, received: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "B M K"]:
        """Return the score for merging each token of ``a`` with each of ``b``."""
        x = tokens.patches.detach()
        score = soften((cosine(gather_rows(x, a), gather_rows(x, b)) + 1).clamp_min(0.0) / 2, self.tau[0])
        for much, tau in ((received.detach(), self.tau[1]), (tokens.size, self.tau[2])):
            much = much.clamp_min(torch.finfo(much.dtype).tiny)
            little = soften(much.amin(1, keepdim=True) / much, tau)
            score = score * little.gather(1, a).unsqueeze(2) * little.gather(1, b).unsqueeze(1)
        return score


class MCTFReducer(Fusion):
    """Merge before the block by the attention that it would compute, and pass the merged attention to the block."""

    def ahead(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        attention = seen.matrix
        dst, weight, lead = self.groups(tokens, attention.mean((1, 2))[:, tokens.prefix :], n)
        tokens = tokens.merge(dst, weight, lead, complete=True)
        return tokens.replace(attn_scale=tokens.size, attention=fuse(attention, dst, weight, lead))


class LateMCTFReducer(Fusion):
    """Merge after the block, by the attention it has computed of the unmerged tokens."""

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        return tokens.replace(per_token={**tokens.per_token, RECEIVED: seen.received.detach()})

    def after(self, tokens: Tokens, n: int) -> Tokens:
        columns = dict(tokens.per_token)
        tokens = tokens.replace(per_token=columns)
        dst, weight, lead = self.groups(tokens, columns.pop(RECEIVED), n)
        tokens = tokens.merge(dst, weight, lead, complete=True)
        return tokens.replace(attn_scale=tokens.size)


@method(
    "mctf",
    title="MCTF: merge what is alike, uninformative and small",
    paper="2403.10030",
    phase="ahead",
    score="similarity",
    score_detail="similarity, attention received and size",
    rest="merged",
    rest_detail="merged by attention and size",
    trained=False,
    full_attention=True,
)
@dataclass(frozen=True)
class MCTF(Pairing):
    """Options of ``mctf``: the number of tokens to merge in each block, and the criteria and directions of matching.

    Args:
        r: tokens merged away in every block but the first: one number, or one for each of these blocks. None: give a keep
            rate instead (at three blocks; the published share of 0.35 is keep=0.65).
        tau_sim: temperature of the similarity: the larger, the smaller its influence. 0 turns the criterion off.
        tau_info: temperature of the information.
        tau_size: temperature of the size.
        direction: match ``both`` ways, or only ``one`` (ToMe's).
        one_step_ahead: merge before the block and reuse its attention, as published; else merge after the block.
        spread: see `Pairing`.
    """

    r: int | tuple[int, ...] | None = None
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    direction: Direction = "both"
    one_step_ahead: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_sim", "tau_info", "tau_size"):
            tau = getattr(self, name)
            require("mctf", name, tau, tau >= 0, "must be 0 (off) or a positive temperature")

    def build(self, site: BlockContext) -> Reducer:
        kind = MCTFReducer if self.one_step_ahead else LateMCTFReducer
        return kind((self.tau_sim, self.tau_info, self.tau_size), self.direction)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.r is None:
            return super().default_schedule(depth, keep, at)
        self.check_alone("r", keep)
        return remove_schedule("mctf", self.r, range(min(1, depth - 1), depth) if at is None else at)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return max(n - int((n + 1) * (1 - rates[-1]) + 1e-9), n - n // 2, min(n, LEAST))

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        counts = super().counts(schedule, depth, patches)
        return tuple(max(n, min(patches, LEAST)) for n in counts) if schedule.unit == "remove_counts" else counts

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        return super().tokens_inside(before, after, site) if self.one_step_ahead else (before, before)

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        matched = (before // 2) * (before - before // 2) * site.dim
        if not self.one_step_ahead:
            return {"matmul": matched}
        # queries, keys and logits are computed for the unmerged tokens, including one class token
        return {"matmul": (before - after) * (2 * site.dim + before + after + 2) * site.dim + matched}
