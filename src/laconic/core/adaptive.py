"""Base classes of adaptive methods, which choose for every image how many tokens to keep."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from laconic.core.gather import arange_like
from laconic.core.method import Method, Reducer
from laconic.core.schedule import Schedule, of_the_initial
from laconic.core.shape_types import Float
from laconic.core.tokens import Tokens

Execution = Literal["packed", "padded", "masked"]


def is_static() -> bool:
    """Return True while a graph is traced (torch.compile, export): no decision may depend on the values of tensors."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def at_least_one(tokens: Tokens, keep: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Return ``keep`` with 1 for the first visible token of each image that would keep none, if there are no prefix tokens.

    Without any token an image has no answer, and one that is masked would have another answer than one that is removed.
    """
    if tokens.prefix:
        return keep
    none = (keep <= 0).all(1, keepdim=True)
    first = arange_like(keep) == tokens.keep_mask_or_ones.argmax(1, keepdim=True)
    return torch.where(none & first, 1.0, keep)


class AdaptiveReducer(Reducer):
    """A reducer that hides tokens with `hide`. Hidden tokens are removed at inference and masked in training."""

    def active(self, before: int, n: int) -> bool:
        return self.site.keep != 1

    @staticmethod
    def hide(tokens: Tokens, keep: Tensor, into: Tensor | None = None) -> Tokens:
        """Hide the tokens whose ``keep`` [B, L] is 0; tokens that are already hidden remain hidden.

        ``into`` [B, L] is the token that takes over the patches of each hidden token (-1, the default: they are dropped).
        One token of each image is visible in any case (see `at_least_one`).
        """
        keep = at_least_one(tokens, keep if tokens.keep_mask is None else keep * tokens.keep_mask)
        gone = torch.full_like(tokens.origin_index, -1) if into is None else into
        return tokens.soft_drop(keep, torch.where(keep > 0, arange_like(tokens.size), gone))

    @classmethod
    def leave(cls, tokens: Tokens, stays: Tensor, into: Tensor | None = None) -> Tokens:
        """Call `hide`, under its name of version 0.1."""
        warnings.warn("AdaptiveReducer.leave is now AdaptiveReducer.hide", DeprecationWarning, stacklevel=2)
        return cls.hide(tokens, stays, into)


@dataclass(frozen=True)
class AdaptiveMethod(Method):
    """The options that all adaptive methods share.

    Args:
        execution: how hidden tokens are run at inference (training always masks them and removes none). ``packed`` runs
            the kept tokens only. ``padded`` pads every image to the largest number of kept tokens in the batch, with masked
            tokens. ``masked`` runs all tokens (constant shapes; torch.compile and export always use it). All three give the
            same outputs.
        bucket: with ``padded``, the length is rounded up to a multiple of this many tokens, so that few different shapes
            occur: compile the parts of the blocks (``block.mlp.compile()``) rather than the model, and each length is
            compiled once.
    """

    execution: Execution = "packed"
    bucket: int = 1

    compacts: ClassVar[bool] = True  # True if hidden tokens may be removed for good

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucket < 1 or (self.bucket > 1 and self.execution != "padded"):
            raise ValueError(
                f"{self.info.name}: bucket is a number of tokens, 1 or more, for execution='padded', not bucket={self.bucket} "
                f"with execution={self.execution!r}"
            )

    @property
    def is_adaptive(self) -> bool:
        return True

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the paper's reducing blocks for a model of this depth."""
        raise NotImplementedError

    def default_schedule(self, depth: int, keep: float | Sequence[float] | None, at: Sequence[int] | None) -> Schedule:
        """Return the schedule for a keep rate; without one the method alone chooses the number of tokens."""
        blocks = self.blocks(depth) if at is None else tuple(at)
        return Schedule.adaptive(blocks) if keep is None else Schedule.rates(keep, blocks)

    def num_kept(self, rates: Sequence[float], n: int, patches: int) -> int:
        return of_the_initial(rates, n, patches)
