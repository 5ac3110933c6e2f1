"""The proof: a file answers as the eager model does, on whole batches, in the runtime that is to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from laconic.exporting.runtimes import Runner
from laconic.exporting.trace import Traced

TOLERANCE = 1e-4  # float32 sums in another order; a token that goes elsewhere differs by far more


@dataclass(frozen=True)
class Parity:
    """One batch: the greatest difference as a share of the largest output, and how many images have the same first class."""

    batch: int
    difference: float
    agreement: float | None


def tensors(output: Any) -> list[Tensor]:
    """All tensors that a model gives."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def compare(batch: int, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Parity:
    """The parity of outputs; infinite where they are not even of the same shape, or not finite."""
    if [out.shape for out in found] != [out.shape for out in expected]:
        return Parity(batch, float("inf"), None)
    scale = [out.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for out in expected]
    far = max(float((f - e).abs().max() / s) for f, e, s in zip(found, expected, scale, strict=True))
    first, other = expected[0], found[0]
    classes = first.dim() == 2 and first.shape[1] > 1
    agreement = float((first.argmax(1) == other.argmax(1)).float().mean()) if classes else None
    return Parity(batch, far if far == far else float("inf"), agreement)


def prove(traced: Traced, run: Runner, runtime: str, tolerance: float) -> list[Parity]:
    """Compare a file with the eager model on every batch.

    Raises:
        ValueError: it differs by more than ``tolerance``.
    """
    parities = []
    for batch in traced.batches:
        images = traced.images(batch)
        with torch.no_grad():
            expected = tensors(traced.model(images))
        parity = compare(batch, run(images), expected)
        if not parity.difference <= tolerance:
            raise ValueError(
                f"in {runtime} the exported model differs from the eager one by {parity.difference:.1e} of its largest output "
                f"at batch {batch}; at most {tolerance:g} is allowed, so no file was written. Another opset or a larger "
                "tolerance may do, if you know why they differ"
            )
        parities.append(parity)
    return parities
