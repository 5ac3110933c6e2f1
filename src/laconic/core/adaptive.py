"""Methods that decide for every image how many tokens it keeps: what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like
from laconic.core.method import Method, Reducer
from laconic.core.schedule import Schedule, of_the_initial
from laconic.core.tokens import Tokens

Execution = Literal["packed", "padded", "masked"]


class AdaptiveReducer(Reducer):
    """It says who stays by `leave`: at inference the house takes the others out, in training nobody sees them."""

    def active(self, before: int, n: int) -> bool:
        return self.site.keep != 1

    @staticmethod
    def leave(tokens: Tokens, stays: Tensor, into: Tensor | None = None) -> Tokens:
        """Hide the tokens whose ``stays`` [B, L] is 0; those hidden before stay hidden.

        ``into`` [B, L] is the token that takes over the patches of each one that leaves (-1, and by default: none does).
        """
        stays = stays if tokens.keep_mask is None else stays * tokens.keep_mask
        gone = torch.full_like(tokens.origin_index, -1) if into is None else into
        return tokens.soft_drop(stays, torch.where(stays > 0, arange_like(tokens.size), gone))


@dataclass(frozen=True)
class AdaptiveMethod(Method):
    """Options that all methods share which decide for every image how many tokens it keeps.

    Args:
        execution: at inference; training always hides tokens and removes none. ``packed`` runs the tokens there are and
            nothing else. ``padded`` fills up to the image of the batch with most tokens; what fills is seen by nobody.
            ``masked`` runs all tokens (constant shapes; so do torch.compile and export, whatever is asked for). The answers
            are the same.
    """

    execution: Execution = "packed"

    compacts: ClassVar[bool] = True  # may tokens that leave be taken out for good?

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Where the paper puts it."""
        raise NotImplementedError

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        """Without a keep rate the method decides alone."""
        blocks = self.blocks(depth) if at is None else tuple(at)
        return Schedule.adaptive(blocks) if keep is None else Schedule.rates(keep, blocks)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)
