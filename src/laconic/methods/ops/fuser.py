"""TokenLearner's TokenFuser (arXiv:2106.11297): run a block on learned tokens, then add its outputs to all patch tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from laconic.core.method import BlockContext, Reducer
from laconic.core.schedule import of_the_initial
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens
from laconic.methods.ops.soft import Mixer

HIDDEN = 64


def mapping(dim: int, slots: int) -> nn.Sequential:
    """Return an MLP that maps the features of every patch token to one number for each learned token."""
    return nn.Sequential(nn.Linear(dim, HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(HIDDEN, max(1, slots)))


class TokenFuser(nn.Module):
    """Compute the update of each patch token: LN, linear layer over the learned tokens, LN; then a sum by sigmoid maps.

    The linear layer starts at zero, so that the initial update is zero.
    """

    def __init__(self, dim: int, slots: int) -> None:
        super().__init__()
        self.before, self.after, self.norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.mix = nn.Linear(slots, slots)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.maps = mapping(dim, slots)

    def forward(self, learned: Float[Tensor, "B M C"], places: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        mixed = self.after(self.mix(self.before(learned).transpose(1, 2)).transpose(1, 2))
        taken: Tensor = self.maps(self.norm(places)).sigmoid() @ mixed
        return taken


class Fused(Reducer):
    """Run one block on a mixer's tokens; after it, restore all patch tokens and add the `TokenFuser`'s update to each."""

    def __init__(self, learner: Mixer, dim: int) -> None:
        super().__init__()
        self.learner, self.fuser = learner, TokenFuser(dim, max(1, learner.slots))

    def active(self, before: int, n: int) -> bool:
        return learned_at(self.site, before) < before

    def before(self, tokens: Tokens, n: int) -> Tokens:
        return self.learner.before(tokens, learned_at(self.site, len(tokens))).replace(parked=tokens)

    def after(self, tokens: Tokens, n: int) -> Tokens:
        places, dtype = tokens.parked, self.fuser.mix.weight.dtype
        if places is None:
            return tokens
        taken = self.fuser(tokens.patches.to(dtype), places.patches.to(dtype)).to(tokens.x.dtype)
        return places.replace(
            x=torch.cat([tokens.x[:, : tokens.prefix], places.patches + taken], 1), per_image=tokens.per_image
        )


def learned_at(site: BlockContext, patches: int) -> int:
    """Return the number of learned tokens in this block for ``patches`` patch tokens, which are all restored after it."""
    schedule = site.schedule
    if schedule is None or site.block not in schedule.at:
        return patches
    value = schedule.values[schedule.at.index(site.block)]
    if schedule.unit == "keep":
        return max(1, of_the_initial((value,), patches, patches))
    return min(patches, int(value)) if schedule.unit == "keep_counts" else max(1, patches - int(value))


def learning(site: BlockContext) -> BlockContext:
    """Return the block context of the mixer: its output count is the number of learned tokens."""
    return dataclasses.replace(site, after=learned_at(site, site.before))
