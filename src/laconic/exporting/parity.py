"""Parity check: compare the outputs of an exported file in its runtime with those of the eager model, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from laconic.exporting.runtimes import Runner
from laconic.exporting.trace import Traced

TOLERANCE = 1e-4  # allows for float32 sums in another order; a different selection of tokens differs by far more


@dataclass(frozen=True)
class Parity:
    """Parity of one batch: the largest difference as a share of the largest output, and the share of equal top classes.

    ``agreement`` is None if the output is not class scores.
    """

    batch: int
    difference: float
    agreement: float | None


def tensors(output: Any) -> list[Tensor]:
    """Return all tensors in a model's output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def compare(batch: int, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Parity:
    """Return the parity of two outputs; its difference is infinite if shapes differ or a value is not finite."""
    if [out.shape for out in found] != [out.shape for out in expected]:
        return Parity(batch, float("inf"), None)
    scale = [out.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for out in expected]
    worst = max(float((f - e).abs().max() / s) for f, e, s in zip(found, expected, scale, strict=True))
    first, other = expected[0], found[0]
    classes = first.dim() == 2 and first.shape[1] > 1
    agreement = float((first.argmax(1) == other.argmax(1)).float().mean()) if classes else None
    return Parity(batch, worst if worst == worst else float("inf"), agreement)


OPSETS_DIFFER = (
    "Scores that are almost equal may choose other tokens in another runtime, on single images: allow a larger tolerance after "
    "comparing the file on images of yours; otherwise try another opset"
)
HALF_DIFFERS = (
    "In fp16 numbers above 65504 overflow, and scores that are almost equal may choose other tokens: export float32, or allow "
    "a larger tolerance after measuring the accuracy of the file"
)


def prove(traced: Traced, run: Runner, runtime: str, tolerance: float, advice: str = OPSETS_DIFFER) -> list[Parity]:
    """Compare a file with the eager model on batches of all sizes in ``traced.batches``.

    Raises:
        ValueError: the outputs differ by more than ``tolerance``.
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
                f"at batch {batch}; at most {tolerance:g} is allowed, so no file was written. {advice}"
            )
        parities.append(parity)
    return parities


def prove_arithmetic(traced: Traced, tolerance: float) -> str:
    """Compare the eager model in fp16 with that in float32, and return the difference as text, for the metadata.

    Runtimes on a CPU may compute an fp16 file in float32, and so hide an overflow that a GPU would have.

    Raises:
        ValueError: the outputs differ by more than ``tolerance``.
    """
    half, images = copy.deepcopy(traced.model).half(), traced.images(traced.batches[-1])
    with torch.no_grad():
        expected = tensors(traced.model(images))
        try:
            found = [out.float() for out in tensors(half(images.half()))]
        except (RuntimeError, TypeError) as error:  # an operator that this torch has not for fp16 on a CPU
            return f"not checked: {' '.join(str(error).split())[:200]}"
    difference = compare(len(images), found, expected).difference
    if not difference <= tolerance:
        raise ValueError(
            f"in fp16 the eager model differs from itself in float32 by {difference:.1e} of its largest output; at most "
            f"{tolerance:g} is allowed, so no file was written. {HALF_DIFFERS}"
        )
    return f"difference {difference:.1e} in eager PyTorch"
