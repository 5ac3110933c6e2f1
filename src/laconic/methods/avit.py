"""A-ViT: Adaptive Tokens for Efficient Vision Transformer (Yin et al., CVPR 2022, arXiv:2112.07658).

After every block each token, including the class token, gets a halting score from its first channel:
h = sigmoid(gate_scale * x[0] - gate_center), without new parameters. Scores are summed over the blocks. A token continues while
its sum is below 1 - eps; the block where the sum reaches that is its last one (all remaining tokens halt at the last block).

* The output is a weighted sum over the blocks: the features of each block have weight h, those of the token's last block have
  the remainder, one minus the sum so far. Only the class token is read, so the sum is computed for the prefix tokens only.
* No token attends to a halted token. Halted patch tokens are dropped; a halted class token stays in the sequence, and its sum
  no longer changes.
* Loss "ponder": the number of blocks of a token, plus the remainder at its last block; the mean over all tokens.
* Loss "distribution": KL divergence, divided by the number of blocks, between the halting scores of the blocks (means over
  tokens, as shares of their sum, clamped to 0.01 to 0.99) and a Gaussian of width one around block ``target_depth`` (counted
  from zero), scaled so that the blocks before it sum to 0.98.

Training hides halted tokens; gradients flow through the scores. ``gate_scale`` and ``gate_center`` are 10 and 30 in the
published DeiT-T, 10 and 75 in the DeiT-S; they must match the weights.

Departures: the published code takes the mean score of a block over all images of a batch but the first; here it is over all
of them. In the published code, halted tokens are set to zero but still have a score, computed from what the zeros become;
here their score is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer
from laconic.core.attention_bias import shown_of
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import EveryBlock, depth_target, halting_divergence, require

SPENT, ANSWER, PONDER, HALTING = "halting spent", "halting answer", "halting ponder", "halting scores"


class AViTReducer(AdaptiveReducer):
    """Score the tokens, add up the scores, and halt the tokens whose sum has reached one."""

    straight_through = False

    def __init__(self, config: AViT) -> None:
        super().__init__()
        self.config = config

    @property
    def last(self) -> bool:
        """True if this is the last block, where all tokens halt."""
        return self.site.block == self.site.depth - 1

    def after(self, tokens: Tokens, n: int) -> Tokens:
        notes, prefix = tokens.per_image, tokens.prefix
        h = torch.sigmoid(self.config.gate_scale * tokens.x[..., 0].float() - self.config.gate_center)
        shown = shown_of(tokens)
        there = torch.ones_like(h) if shown is None else shown
        spent = torch.cat([notes[SPENT], tokens.per_token[SPENT]], 1) if SPENT in notes else torch.zeros_like(h)
        on = torch.zeros_like(h) if self.last else (spent + h < 1 - self.config.eps) * there
        weight = there * torch.where(on > 0, h, 1 - spent)
        own = weight[:, :prefix].unsqueeze(-1) * tokens.x[:, :prefix].float()
        blocks = there * torch.where(on > 0, 1.0, 2 - spent)
        total = prefix + tokens.token_of_patch.shape[1]  # including halted tokens
        answer, ponder = notes.get(ANSWER, 0.0) + own, notes.get(PONDER, 0.0) + blocks.sum(1) / total
        tokens = tokens.set_per_image(**{PONDER: ponder}).append_per_image(
            **{HALTING: (h * there).sum(1, keepdim=True) / total}
        )
        if self.last:
            return tokens.replace(x=torch.cat([answer.to(tokens.x.dtype), tokens.patches], 1))
        spent = torch.where(on > 0, spent + h, spent)
        tokens = tokens.set_per_image(**{ANSWER: answer, SPENT: spent[:, :prefix]})
        columns = {**tokens.per_token, SPENT: spent[:, prefix:]}
        return self.hide(tokens, on[:, prefix:]).replace(visible_prefix=on[:, :prefix], per_token=columns)

    def losses(self, tokens: Tokens, rate: float) -> dict[str, Tensor]:
        schedule = self.site.schedule
        if not self.last or schedule is None or PONDER not in tokens.per_image:
            return {}
        target = depth_target(self.site.depth, self.config.target_depth, schedule.at, tokens.per_image[HALTING])
        divergence = halting_divergence(tokens.per_image[HALTING].mean(0), target)
        return {"ponder": tokens.per_image[PONDER].mean(), "distribution": divergence}


@method(
    "avit",
    title="A-ViT: tokens halt when their scores sum to one",
    paper="2112.07658",
    phase="after",
    score="features",
    score_detail="first channel",
    rest="dropped",
    trained=True,
    count="variable",
    class_readout=True,
)
@dataclass(frozen=True)
class AViT(EveryBlock):
    """Options of ``avit``: the halting score, the target block for halting, the loss weights; and those of `AdaptiveMethod`."""

    gate_scale: float = 10.0
    gate_center: float = 30.0
    eps: float = 0.01
    target_depth: int = 8
    ponder: float = 5e-4
    distribution: float = 1e-3

    tuning_hint: ClassVar[str] = "for fewer tokens, train with a higher ponder=, or use a lower gate_center="

    def __post_init__(self) -> None:
        super().__post_init__()
        require("avit", "eps", self.eps, 0 < self.eps < 1, "must be between 0 and 1")
        require("avit", "target_depth", self.target_depth, self.target_depth >= 1, "must be a block number of at least 1")

    def build(self, site: BlockContext) -> Reducer:
        return AViTReducer(self)

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        if schedule.at[-1] != depth - 1:
            where = f"at must end with {depth - 1}, not with {schedule.at[-1]}"
            raise ValueError(f"avit needs the model's last block, where all tokens halt and its output is formed: {where}")
        return super().counts(schedule, depth, patches)

    def loss_weights(self) -> dict[str, float]:
        return {"ponder": self.ponder, "distribution": self.distribution}

    def macs(self, before: int, after: int, site: BlockContext) -> dict[str, int]:
        return {"elementwise": before + 1 + site.dim}
