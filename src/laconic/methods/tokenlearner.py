"""TokenLearner: What Can 8 Learned Tokens Do for Images and Videos? (Ryoo et al., NeurIPS 2021, arXiv:2106.11297).

Before one block, by default at three quarters of the depth, the patch tokens become S new ones. Each has its own map over the
positions, computed from the layer-normalised tokens, and is the sum of the input tokens weighted by that map:

* ``version="1.1"``: the maps are softmaxes over the positions of Linear(GELU(Linear(LN(x)))), C to 64 to S channels.
* ``version="1"`` (sec. 2, eqs. 1-2): the maps are sigmoids of four 3x3 convolutions to S channels (no bias, GELU between
  them), and the sum is not normalised. It needs all patches on their grid.

``after="fused"`` is the paper's TokenFuser: at every block from there on S tokens are learned, and after the block all patch
tokens are restored: to each is added a sum of the block's outputs for the learned tokens, weighted by its own sigmoid maps
(zero at initialisation).

GELU is the tanh approximation, as in the published code. Departures: the published model has no class token, here prefix
tokens bypass the module; its dropout is omitted. S is the count of the schedule; without a keep rate it is their 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import HIDDEN, Fused, Mixer, Slots, learned_at, learning, mapping

LEARNED = 16  # tokens, in the published configuration


class TokenLearnerReducer(Mixer):
    """Version 1.1: maps by an MLP, softmax over the positions."""

    def __init__(self, site: BlockContext) -> None:
        super().__init__("tokenlearner", site)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        self.maps = mapping(site.dim, self.slots)

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self.maps(self.norm(x)).float().softmax(1).transpose(1, 2), tokens.patches


class ConvolutionalReducer(Mixer):
    """Version 1: maps by convolutions over the grid, sigmoid, sum without normalisation."""

    def __init__(self, site: BlockContext) -> None:
        super().__init__("tokenlearner", site)
        slots = max(1, self.slots)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        layers: list[nn.Module] = [nn.Conv2d(site.dim, slots, 3, padding=1, bias=False)]
        for _ in range(3):
            layers += [nn.GELU(approximate="tanh"), nn.Conv2d(slots, slots, 3, padding=1, bias=False)]
        self.maps = nn.Sequential(*layers)

    def matrix(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        grid = tokens.grid or (0, 0)
        if len(grid) != 2:
            raise ValueError(
                "tokenlearner: version='1' has convolutions over the grid of an image, and this model takes clips; pass "
                "version='1.1'"
            )
        rows, columns = grid
        if tokens.origin is not None or len(tokens) != rows * columns:
            raise ValueError(
                f"tokenlearner: version='1' needs all patches on their grid, and got {len(tokens)} tokens"
                f"{'' if tokens.origin is None else ' that an earlier block has reduced'}; reduce at one block only, or pass "
                "version='1.1'"
            )
        image = self.norm(x).transpose(1, 2).unflatten(2, (rows, columns))
        return self.maps(image).float().sigmoid().flatten(2), tokens.patches


@method(
    "tokenlearner",
    title="TokenLearner: a few tokens, each with a learned map",
    paper="2106.11297",
    phase="before",
    score="learned",
    score_detail="learned maps",
    rest="mixed",
    rest_detail="mixed by learned maps",
    trained=True,
    learns=True,
)
@dataclass(frozen=True)
class TokenLearner(Slots):
    """Options of ``tokenlearner``.

    Args:
        version: ``1.1`` (an MLP, softmax) or ``1`` (convolutions, sigmoid; needs all patches).
        after: the output of a block: the learned ``tokens``, or all patch tokens, ``fused`` with them.
    """

    version: Literal["1.1", "1"] = "1.1"
    after: Literal["tokens", "fused"] = "tokens"

    def build(self, site: BlockContext) -> Reducer:
        site = learning(site) if self.after == "fused" else site
        learner = TokenLearnerReducer(site) if self.version == "1.1" else ConvolutionalReducer(site)
        return learner if self.after == "tokens" else Fused(learner, site.dim)

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        first = depth * 3 // 4
        blocks = tuple(range(first, depth if self.after == "fused" else first + 1) if at is None else at)
        return Schedule.keep_counts(dict.fromkeys(blocks, LEARNED)) if keep is None else Schedule.rates(keep, blocks)

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        return (patches,) * depth if self.after == "fused" else super().counts(schedule, depth, patches)

    def tokens_inside(self, before: int, after: int, site: BlockContext) -> tuple[int, int]:
        learned = learned_at(site, before) if self.after == "fused" else after
        return learned, learned

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        slots = self.tokens_inside(before, after, site)[0]
        one = (site.dim + slots) * HIDDEN if self.version == "1.1" else 9 * (site.dim * slots + 3 * slots * slots)
        work = {"matmul": before * one + before * slots * (site.dim + 1), "layernorm": before * site.dim}
        if self.after == "fused":
            work["matmul"] += before * (site.dim + slots) * HIDDEN + before * slots * site.dim + slots * slots * site.dim
            work["layernorm"] += (before + 2 * slots) * site.dim
        return work
