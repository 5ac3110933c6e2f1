"""MCTF: Multi-criteria Token Fusion with One-step-ahead Attention (Lee et al., CVPR 2024, arXiv:2403.10030).

At the input of a block, with the attention A that the block would compute of these tokens:

* Three criteria score a pair, each softened by a temperature as its exponent 1 / tau: similarity (cos + 1) / 2 of the
  features, information (of two tokens that receive little attention there is little to lose: 1 / mean attention received, of
  both) and size (1 / patches, of both), the last two relative to their largest.
* Matching goes both ways. Of the tokens at even places of the sequence the r // 2 best matched go to tokens at odd
  places; then of all tokens at odd places (with what went to them) the others of the r go to an even one that stayed.
* A group becomes its mean weighted by attention received times size.
* One step ahead: the merged tokens keep the attention of the unmerged. Of A, columns of a group are summed and rows are
  averaged by the same weights, and the block multiplies the result with the values of the merged tokens.

Sizes weigh the attention (proportional attention). Out come the even tokens in order, then the odd ones by falling score
(in order, where matching goes ``one`` way).
At least `LEAST` patch tokens and the class token stay. Published numbers are of models fine-tuned for 30 epochs, with a
consistency loss between two merging rates that is not here: train with soft distillation from the unreduced model instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.attention import Seen
from laconic.parts import bipartite, by_parity, cosine, lay, share, split
from laconic.reducer import Method, Reducer, Site, choice, method
from laconic.rows import add_rows, iota, take
from laconic.schedule import Schedule
from laconic.shapes import Float, Int
from laconic.tokens import Tokens

LEAST = 9
Direction = Literal["both", "one"]


def fuse(
    attention: Float[Tensor, "B H N N"], dst: Int[Tensor, "B L"], weight: Float[Tensor, "B L"], count: int
) -> Float[Tensor, "B H M M"]:
    """Attention among merged tokens: rows averaged by ``weight``, columns summed; prefix tokens are as they are."""
    batch, heads, before, _ = attention.shape
    prefix, total = before - dst.shape[1], before - dst.shape[1] + count
    every = torch.cat([torch.arange(prefix, device=dst.device).expand(batch, -1), dst + prefix], 1)
    rows = attention * F.pad(weight, (prefix, 0), value=1.0).unsqueeze(1).unsqueeze(3)
    rows = add_rows(rows.transpose(1, 2).flatten(2), every, total).view(batch, total, heads, before)
    columns = add_rows(rows.permute(0, 3, 2, 1).flatten(2), every, total)
    return columns.view(batch, total, heads, total).permute(0, 2, 3, 1)


class MCTFReducer(Reducer):
    """Match both ways by three criteria, merge, and hand the merged attention on."""

    def __init__(self, tau: tuple[float, float, float], direction: Direction) -> None:
        super().__init__()
        self.tau, self.direction = tau, direction

    def ahead(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        attention = seen.matrix
        received = attention.mean((1, 2))[:, tokens.prefix :]
        dst, lead = self.match(tokens, received, len(tokens) - n)
        weight = share(received * tokens.size, dst, n)
        tokens = tokens.merge(dst, weight, lead)
        return tokens.replace(gate=tokens.size, attention=fuse(attention, dst, weight, n))

    def match(self, tokens: Tokens, received: Float[Tensor, "B L"], r: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
        """Where each token goes, and the tokens that stay."""
        a, b = by_parity(tokens)
        if r > len(tokens) // 2:
            raise ValueError(f"mctf merges away at most half of the tokens of a block: {r} of {len(tokens)} were asked for")
        score = self.score(tokens, received, a, b)
        gone_a, stay_a, match = bipartite(score, r // 2 if self.direction == "both" else r)
        gone_b, stay_b, host = b[:, :0], iota(b), b
        if self.direction == "both":
            best, host = take(score, stay_a).max(1)
            gone_b, stay_b = split(best, r - gone_a.shape[1])
        of_b = lay(stay_b, gone_b, iota(stay_b) + stay_a.shape[1], host.gather(1, gone_b))
        of_a = lay(stay_a, gone_a, iota(stay_a), of_b.gather(1, match))
        return lay(a, b, of_a, of_b), torch.cat([a.gather(1, stay_a), b.gather(1, stay_b)], 1)

    def score(self, tokens: Tokens, received: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "B M K"]:
        """How well each token of ``a`` goes with each of ``b``."""
        x = tokens.patches.detach()
        score = soften((cosine(take(x, a), take(x, b)) + 1).clamp_min(0.0) / 2, self.tau[0])
        for much, tau in ((received.detach(), self.tau[1]), (tokens.size, self.tau[2])):
            much = much.clamp_min(torch.finfo(much.dtype).tiny)
            little = soften(much.amin(1, keepdim=True) / much, tau)
            score = score * little.gather(1, a).unsqueeze(2) * little.gather(1, b).unsqueeze(1)
        return score


def soften(criterion: Tensor, tau: float) -> Tensor:
    """criterion^(1 / tau); tau 0 leaves it out."""
    return criterion.pow(1 / tau) if tau else torch.ones_like(criterion)


@method(
    "mctf",
    title="MCTF: merge what is alike, uninformative and small",
    paper="2403.10030",
    moment="ahead",
    score="similarity, attention received and size",
    rest="merged by attention and size",
    trained=False,
    full_attention=True,
)
@dataclass(frozen=True)
class MCTF(Method):
    """Options of ``mctf``: tokens to take away in each block, and how the criteria and directions are weighed.

    Args:
        r: tokens merged away in every block but the first: one number, or one for each of these blocks. None: give a keep
            rate instead (at three blocks; the published share of 0.35 is keep=0.65).
        tau_sim: temperature of the similarity: the larger, the less it counts. 0 leaves the criterion out.
        tau_info: temperature of the information.
        tau_size: temperature of the size.
        direction: match ``both`` ways, or only ``one`` (ToMe's).
    """

    r: int | tuple[int, ...] | None = None
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    direction: Direction = "both"

    halves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice("mctf", "direction", self.direction, ("both", "one"))
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"mctf: {name} must be 0 (off) or a positive temperature, not {getattr(self, name)!r}")

    def build(self, site: Site) -> Reducer:
        return MCTFReducer((self.tau_sim, self.tau_info, self.tau_size), self.direction)

    def plan(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        if self.r is None:
            return super().plan(depth, keep, at)
        if keep is not None:
            raise ValueError("mctf: give either r (tokens taken away in every block) or keep, not both")
        blocks = range(min(1, depth - 1), depth) if at is None else at
        r = (self.r,) * len(blocks) if isinstance(self.r, int) else self.r
        if len(r) != len(blocks):
            raise ValueError(f"mctf: {len(r)} values of r for {len(blocks)} blocks")
        return Schedule.removing(dict(zip(blocks, r, strict=True)))

    def leaves(self, rates: Sequence[float], n: int, patches: int) -> int:
        return max(n - int((n + 1) * (1 - rates[-1]) + 1e-9), n - n // 2, min(n, LEAST))

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        counts = super().counts(schedule, depth, patches)
        return tuple(max(n, min(patches, LEAST)) for n in counts) if schedule.unit == "remove" else counts

    def macs(self, before: int, after: int, site: Site) -> dict[str, int]:
        # queries, keys and logits are of the unmerged tokens, one class token among them
        more = (before - after) * (2 * site.dim + before + after + 2) * site.dim
        return {"matmul": more + (before // 2) * (before - before // 2) * site.dim}
