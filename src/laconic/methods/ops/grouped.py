"""Methods that group patches at the patch embedding, and make each group one token before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laconic.core.adaptive import AdaptiveReducer
from laconic.core.gather import add_rows, arange_like, places
from laconic.core.method import Method
from laconic.core.patch_input import GROUP
from laconic.core.schedule import Schedule
from laconic.core.shape_types import Int
from laconic.core.tokens import Tokens


@dataclass(frozen=True)
class BeforeBlocks(Method):
    """A method that works before the first block only."""

    before_blocks: ClassVar[bool] = True

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        schedule = super().default_schedule(depth, keep, (0,) if at is None else at)
        self._check_first(schedule)
        return schedule

    def counts(self, schedule: Schedule, depth: int, patches: int) -> tuple[int, ...]:
        self._check_first(schedule)
        return super().counts(schedule, depth, patches)

    def _check_first(self, schedule: Schedule) -> None:
        if schedule.at != (0,):
            raise ValueError(
                f"{self.info.name} reduces patches before the first block, so its schedule has block 0 only, not "
                f"{list(schedule.at)}; laconic.Chain combines it with a method for later blocks"
            )


def taken(tokens: Tokens) -> tuple[Int[Tensor, "B P"], Tokens]:
    """Return the groups of the patches (`laconic.core.patch_input.PatchInput.group`), and the tokens without them."""
    columns = dict(tokens.per_token)
    return columns.pop(GROUP), tokens.replace(per_token=columns)


def merge_groups(tokens: Tokens, n: int) -> Tokens:
    """Merge each group of patches into its mean; every image has exactly ``n`` groups. Tokens are in raster order."""
    group, tokens = taken(tokens)
    firsts = group == arange_like(group)
    return tokens.merge((firsts.cumsum(1) - 1).gather(1, group), None, places(firsts, n), complete=True)


def hide_groups(tokens: Tokens, *, mean: bool) -> Tokens:
    """Hide all patches but the first of each group, which holds the group; patches of group -1 are dropped.

    With ``mean`` the first gets the mean of its group, otherwise it stays as it is.
    """
    group, tokens = taken(tokens)
    first = group == arange_like(group)
    if mean:
        held = (group >= 0).to(tokens.size.dtype)
        into = group.clamp_min(0)
        size = add_rows(held, into, len(tokens)).clamp_min(1)
        total = add_rows(tokens.patches * held.unsqueeze(2), into, len(tokens))
        means = (total / size.unsqueeze(2)).to(tokens.x.dtype)
        patches = means.where(first.unsqueeze(2), tokens.patches)
        tokens = tokens.replace(x=torch.cat([tokens.x[:, : tokens.prefix], patches], 1))
    return AdaptiveReducer.hide(tokens, first.to(tokens.size.dtype), group)
