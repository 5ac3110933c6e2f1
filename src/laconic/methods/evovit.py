"""Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer (Xu et al., AAAI 2022, arXiv:2108.01390).

The class token's attention, evolved over the layers (g <- g / 2 + attention / 2 for the tokens that are run, eq. 4), says who
is informative. Before a block the int(rate * N) most informative tokens go on (the slow path); the others, the
placeholders, sit out a stage of blocks and come back after its end. So the image stays complete, and the next stage chooses
again. Its published model reads the mean over all patches, placeholders among them.

* ``update="parked"``: placeholders come back as they were. That is what the published DeiT code does, and its checkpoints
  need. ``update="fast"`` is the paper's (eqs. 5-6): the g-weighted mean of the placeholders goes along as one more token, and
  what the blocks add to it is added to every placeholder at the end of the stage.
* ``stages="block"`` chooses anew before every block (the first 200 epochs of its training), ``"scheduled"`` at the
  schedule's blocks: by default after a third and two thirds of the depth.

Training is the same operation. The published loss has a second head on the class token; that is up to the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from laconic.attention import Seen
from laconic.parts import SCORES, ScoreName, split
from laconic.reducer import Method, Reducer, Site, choice, method
from laconic.rows import iota, take
from laconic.schedule import Schedule, of_the_initial
from laconic.tokens import Tokens

EVOLVED, ENTERED = "evolved attention", "representative"


class EvoViTReducer(Reducer):
    """Choose, part, evolve the scores, bring together: whatever is due at this block."""

    def __init__(self, config: EvoViT) -> None:
        super().__init__()
        self.config = config

    def active(self, before: int, n: int) -> bool:
        return self.site.schedule is not None and any(value != 1 for value in self.site.schedule.values)

    def before(self, tokens: Tokens, n: int) -> Tokens:
        if not self.config.chooses(self.site):
            return tokens
        score, patches = tokens.columns[EVOLVED], tokens.where.shape[1]
        slow, parked = split(score, self.config.chosen(self.site, patches))
        aside, tokens = tokens.keep(parked), tokens.keep(slow)
        if self.config.update == "fast":
            share = take(score, parked).unsqueeze(1)
            mean = (share / share.sum(2, keepdim=True)) @ aside.patches.float()
            tokens = tokens.append(mean, aside.place[:, :1])
            tokens = tokens.note(**{ENTERED: tokens.patches[:, -1:]})
        return tokens.replace(aside=aside)

    def between(self, tokens: Tokens, seen: Seen, n: int) -> Tokens:
        now, old = SCORES[self.config.score](tokens, seen), tokens.columns.get(EVOLVED)
        return tokens.replace(columns={**tokens.columns, EVOLVED: now if old is None else (old + now) / 2})

    def after(self, tokens: Tokens, n: int) -> Tokens:
        aside = tokens.aside
        if aside is None or not self.config.restores(self.site):
            return tokens
        if self.config.update == "fast":
            added = tokens.patches[:, -1:] - tokens.notes[ENTERED]
            tokens = tokens.keep(iota(tokens.size)[:, :-1])
            aside = aside.replace(x=torch.cat([aside.x[:, : aside.prefix], aside.patches + added], 1))
        notes = {name: note for name, note in tokens.notes.items() if name != ENTERED}
        return tokens.join(aside).replace(aside=None, notes=notes)


@method(
    "evovit",
    title="Evo-ViT: let the uninformative tokens sit out",
    paper="2108.01390",
    moment="before",
    score="class attention",
    rest="parked, and brought back",
    trained=True,
)
@dataclass(frozen=True)
class EvoViT(Method):
    """Options of ``evovit``: what becomes of placeholders, when tokens are chosen, and what attention scores them."""

    update: Literal["parked", "fast"] = "parked"
    stages: Literal["scheduled", "block"] = "scheduled"
    score: ScoreName = "class"

    official_model: ClassVar[Mapping[str, Any]] = {"global_pool": "avg"}

    def __post_init__(self) -> None:
        choice("evovit", "update", self.update, ("parked", "fast"))
        choice("evovit", "stages", self.stages, ("scheduled", "block"))
        choice("evovit", "score", self.score, list(SCORES))

    def build(self, site: Site) -> Reducer:
        return EvoViTReducer(self)

    # ---------------------------------------------------------------------------------------------- the schedule
    def plan(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        blocks = (depth // 3, 2 * depth // 3) if at is None else tuple(at)
        if blocks and blocks[0] == 0:
            raise ValueError("evovit chooses by the attention of the block before; at must not name block 0")
        return Schedule.rates(0.5 if keep is None else keep, blocks)

    def works_at(self, schedule: Schedule, depth: int) -> Sequence[int]:
        return range(max(0, schedule.at[0] - 1), depth)

    def chooses(self, site: Site) -> bool:
        """Whether tokens are chosen before this block."""
        at = site.schedule.at if site.schedule is not None else ()
        return site.block >= at[0] if self.stages == "block" else site.block in at

    def restores(self, site: Site) -> bool:
        """Whether the placeholders come back after this block."""
        at = site.schedule.at if site.schedule is not None else ()
        return self.stages == "block" or site.block + 1 in (*at, site.depth)

    def chosen(self, site: Site, patches: int) -> int:
        """Patch tokens on the slow path at this block: of all patches, since all have come back."""
        schedule = site.schedule
        if schedule is None or site.block < schedule.at[0]:
            return patches
        value = schedule.values[sum(block <= site.block for block in schedule.at) - 1]
        if schedule.unit == "keep":
            return max(1, of_the_initial((value,), patches, patches))
        return min(patches, int(value)) if schedule.unit == "leave" else max(1, patches - int(value))

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        sites = [Site(0, block, 0, 0, None, depth=depth, schedule=schedule) for block in range(depth)]
        return tuple(patches if self.restores(site) else self.inside(patches, patches, site, patches)[0] for site in sites)

    def inside(self, before: int, after: int, site: Site, patches: int | None = None) -> tuple[int, int]:
        whole = site.grid[0] * site.grid[1] if patches is None else patches
        count = self.chosen(site, whole)
        count += self.update == "fast" and count < whole
        return count, count

    # ---------------------------------------------------------------------------------------------- the authors' names
    def official(self, weights: Mapping[str, Tensor], at: Sequence[int]) -> dict[str, Tensor]:
        """Their q, k and v lie apart, their norms and projections beside the blocks; their second head is for training."""
        out = {name: w for name, w in weights.items() if not name.startswith(("qks.", "vs.", "norm_cls.", "head_cls."))}
        for name, qk in weights.items():
            if name.startswith("qks."):
                _, block, _, kind = name.split(".")
                out[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([qk, weights[f"vs.{block}.v.{kind}"]])
        for theirs, ours in (("norms.", "norm1"), ("projs.", "attn.proj")):
            for name in [name for name in out if name.startswith(theirs)]:
                out[f"blocks.{name.split('.')[1]}.{ours}.{name.rpartition('.')[2]}"] = out.pop(name)
        return {name.replace("norm.", "fc_norm.", 1) if name.startswith("norm.") else name: w for name, w in out.items()}
