"""Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer (Xu et al., AAAI 2022, arXiv:2108.01390).

The class token's attention, evolved over the layers (g <- g / 2 + attention / 2 for the tokens that are run, eq. 4), is the
importance of a token. The int(rate * N) most informative tokens go through the blocks (the slow path); the others, the
placeholders, skip a stage of blocks and are appended again after its end. So all patches are kept, and the next stage chooses
again. The published model pools the mean over all patches, including placeholders.

* ``update="parked"``: placeholders come back unchanged. The published DeiT code does this, and its checkpoints need it.
  ``update="fast"`` follows the paper (eqs. 5-6): the g-weighted mean of the placeholders goes through the blocks as one more
  token, and what the blocks add to it is added to every placeholder at the end of the stage.
* ``stages="block"`` chooses again before every block (the first 200 epochs of its training), ``"scheduled"`` at the blocks of
  the schedule: by default after a third and two thirds of the depth.

Training runs the same operation. With ``second_head``, a number of classes, a norm and a linear layer also read the class
token after the last block, as in the published training: the loss is half the cross-entropy of each head. Inference does not
use the second head, and checkpoints can be loaded with or without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from laconic.core.attention import AttentionView
from laconic.core.gather import arange_like, gather_rows
from laconic.core.method import BlockContext, Reducer, method
from laconic.core.schedule import Schedule
from laconic.core.tokens import Tokens
from laconic.methods.ops import CLASS_LOGITS, SCORES, ClassHead, ScoreName, SlowPath, joined, renamed, require, topk_split

EVOLVED, ENTERED = "evolved attention", "representative"


class EvoViTReducer(Reducer):
    """Choose the slow tokens, park the placeholders, evolve the scores, append the placeholders, as scheduled at this block."""

    def __init__(self, config: EvoViT, site: BlockContext) -> None:
        super().__init__()
        read = config.second_head is not None and site.block == site.depth - 1
        self.config, self.second_head = config, ClassHead(site.dim, config.second_head or 0) if read else None

    def active(self, before: int, n: int) -> bool:
        schedule = self.site.schedule
        reduces = schedule is not None and (schedule.unit != "keep" or any(value != 1 for value in schedule.values))
        return reduces or (self.second_head is not None and self.training)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        schedule, block, patches = self.site.schedule, self.site.block, tokens.token_of_patch.shape[1]
        count = self.config.slow(schedule, block, patches)
        if count == patches or not self.config.chooses(schedule, block):
            return tokens
        score = tokens.per_token[EVOLVED]
        slow, parked = topk_split(score, count)
        aside, tokens = tokens.keep(parked), tokens.keep(slow)
        if self.config.update == "fast":
            share = gather_rows(score, parked).unsqueeze(1)
            mean = (share / share.sum(2, keepdim=True)) @ aside.patches.float()
            tokens = tokens.append(mean, aside.origin_index[:, :1])
            tokens = tokens.set_per_image(**{ENTERED: tokens.patches[:, -1:]})
        return tokens.replace(parked=aside)

    def between(self, tokens: Tokens, seen: AttentionView, n: int) -> Tokens:
        now, old = SCORES[self.config.score](tokens, seen), tokens.per_token.get(EVOLVED)
        return tokens.replace(per_token={**tokens.per_token, EVOLVED: now if old is None else (old + now) / 2})

    def after(self, tokens: Tokens, n: int) -> Tokens:
        aside = tokens.parked
        if aside is not None and self.config.restores(self.site.schedule, self.site.block, self.site.depth):
            if self.config.update == "fast":
                added = tokens.patches[:, -1:] - tokens.per_image[ENTERED]
                tokens = tokens.keep(arange_like(tokens.size)[:, :-1])
                aside = aside.replace(x=torch.cat([aside.x[:, : aside.prefix], aside.patches + added], 1))
            notes = {name: note for name, note in tokens.per_image.items() if name != ENTERED}
            tokens = tokens.join(aside).replace(parked=None, per_image=notes)
        return tokens if self.second_head is None else self.second_head(tokens)


@method(
    "evovit",
    title="Evo-ViT: let the uninformative tokens sit out",
    paper="2108.01390",
    phase="before",
    score="class attention",
    rest="parked",
    rest_detail="parked, and brought back",
    trained=True,
)
@dataclass(frozen=True)
class EvoViT(SlowPath):
    """Options of ``evovit``: those of `SlowPath`, the attention score of a token, and a second head for training."""

    score: ScoreName = "class"
    second_head: int | None = None  # number of classes

    official_model: ClassVar[Mapping[str, Any]] = {"global_pool": "avg"}

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.second_head is None or self.second_head >= 1
        require("evovit", "second_head", self.second_head, fits, "must be a number of classes, or None")

    def build(self, site: BlockContext) -> Reducer:
        return EvoViTReducer(self, site)

    def loss_weights(self) -> dict[str, float]:
        return {} if self.second_head is None else {"cross_entropy": 0.5, CLASS_LOGITS: 0.5}

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        blocks = (depth // 3, 2 * depth // 3) if at is None else tuple(at)
        if blocks and blocks[0] == 0:
            raise ValueError("evovit chooses tokens by the attention of the block before; remove block 0 from at")
        return Schedule.rates(0.5 if keep is None else keep, blocks)

    def convert_official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Rename the authors' weights: q, k, v are apart; norms, projections and second head lie outside the blocks."""
        last = max((int(name.split(".")[1]) for name in weights if name.startswith("norms.")), default=0)
        second = [rf"laconic.reducers.{last}.second_head.\1.\2"] if self.second_head is not None else []
        layers = [(r"(?:qks|vs)\.(\d+)\.(.+)", r"blocks.\1.attn.\2"), (r"norm\.(.+)", r"fc_norm.\1")]
        outside = [(r"norms\.(\d+)\.(.+)", r"blocks.\1.norm1.\2"), (r"projs\.(\d+)\.(.+)", r"blocks.\1.attn.proj.\2")]
        ours = renamed(weights, *layers, *outside, (r"(norm|head)_cls\.(.+)", *second))
        return joined(ours, ("attn.qk", "attn.v"), "attn.qkv")
