"""Parity check: compare the outputs of an exported file in its runtime with those of the eager model, batch by batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from laconic.exporting.runtimes import Runner
from laconic.exporting.trace import Traced

TOLERANCE = 1e-4  # allows for float32 sums in another order; a different selection of tokens differs by far more
# Where two scores are equal up to rounding, a runtime may choose other tokens, and is not wrong. Such an image is replaced by
# another one, if the eager model itself gives another answer once its pixels change by `NUDGE`, in one of `COPIES` copies.
NUDGE, HALF_NUDGE = 1e-5, 1e-3
COPIES = 8
DRAWS = 4  # sets of images at most


@dataclass(frozen=True)
class Parity:
    """Parity of one batch: the largest difference as a share of the largest output, and the share of equal top classes.

    ``agreement`` is None if the output is not class scores. ``replaced`` is the number of images for which the eager model
    itself has no stable answer, and which other images replaced.
    """

    batch: int
    difference: float
    agreement: float | None
    replaced: int = 0


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


def prove(
    traced: Traced, run: Runner, runtime: str, tolerance: float, advice: str = OPSETS_DIFFER, nudge: float = NUDGE
) -> list[Parity]:
    """Compare a file with the eager model on batches of all sizes in ``traced.batches``.

    Images on which the eager model's own answer changes by more than ``tolerance`` if pixels change by ``nudge`` (a share of
    their standard deviation) are replaced by others.

    Raises:
        ValueError: the outputs differ by more than ``tolerance`` on an image with a stable answer, or none was found.
    """
    return [_prove_batch(traced, run, batch, runtime, tolerance, advice, nudge) for batch in traced.batches]


def _prove_batch(traced: Traced, run: Runner, batch: int, runtime: str, tolerance: float, advice: str, nudge: float) -> Parity:
    images, replaced = traced.images(batch), 0
    for draw in range(1, DRAWS + 1):
        with torch.no_grad():
            expected = tensors(traced.model(images))
        found = run(images)
        parity = compare(batch, found, expected)
        if parity.difference <= tolerance:
            return dataclasses.replace(parity, replaced=replaced)
        differs = _differs(found, expected, tolerance)
        if differs is None or not bool((_unstable(traced, images, expected, tolerance, nudge) | ~differs).all()):
            break
        replaced += int(differs.sum())
        images = torch.where(differs.view(-1, *(1,) * len(traced.shape)), traced.images(batch, seed=draw), images)
    raise ValueError(
        f"in {runtime} the exported model differs from the eager one by {parity.difference:.1e} of its largest output "
        f"at batch {batch}; at most {tolerance:g} is allowed, so no file was written. {advice}"
    )


def _unstable(traced: Traced, images: Tensor, expected: Sequence[Tensor], tolerance: float, nudge: float) -> Tensor:
    """Return for each image, as [B], whether the eager model's answer differs in a copy with slightly other pixels."""
    unstable, noise = torch.zeros(len(images), dtype=torch.bool), torch.Generator().manual_seed(0)
    for _ in range(COPIES):
        with torch.no_grad():
            again = tensors(traced.model(images + nudge * torch.randn(images.shape, generator=noise)))
        differs = _differs(again, expected, tolerance)
        unstable |= False if differs is None else differs
    return unstable


def _differs(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> Tensor | None:
    """Return for each image, as [B], whether an output differs by more than ``tolerance``; None if shapes do not fit."""
    if not expected or [out.shape for out in found] != [out.shape for out in expected]:
        return None
    if {len(out) if out.dim() else 0 for out in expected} != {len(expected[0])}:
        return None
    scale = [out.abs().max().clamp_min(torch.finfo(torch.float32).tiny) for out in expected]
    shares = [
        ((f - e).abs().flatten(1).amax(1) if e.dim() > 1 else (f - e).abs()) / s
        for f, e, s in zip(found, expected, scale, strict=True)
    ]
    return ~(torch.stack(shares).amax(0) <= tolerance)  # also where a value is not a number


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
