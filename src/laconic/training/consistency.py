"""Training of MCTF (Lee et al., CVPR 2024, arXiv:2403.10030): a second pass that removes fewer tokens teaches the first.

For each batch a share is drawn uniformly from [0, ``most``), and the teacher's pass removes that share of the tokens that the
schedule removes at each block (whole tokens, rounded down). Both passes are trained by their own cross-entropy. In addition,

    consistency = mean over the confident images of |f - f'|^2 / C,

where f and f' are the inputs of the head in student and teacher (the class token after the last norm, or pooled features);
f' has no gradient. Loss = cross_entropy + teacher + 3 consistency. An image is confident if the probability of its label is
above 0.4.

    losses = consistency_step(model, images, labels)
    losses["loss"].backward()

Published: 30 epochs; with r=16 the teacher removes 0 to 7 tokens, with a share of 0.35 up to 0.15 (``most=3/7``). In the
published code the student's confidence counts (``judge``), and the probabilities of both classes of a mixed image are added;
if both are the same class, the published code counts its probability twice, this one once. Any method with a schedule can
be trained in this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.core.schedule import Schedule
from laconic.core.shape_types import Float
from laconic.core.token_reduction import TokenReduction, reduction_of
from laconic.core.values import choice

Judge = Literal["student", "teacher"]


@dataclass(frozen=True)
class Answer:
    """The outputs of one pass."""

    read: Float[Tensor, "B C"]  # input of the head
    logits: Float[Tensor, "B K"]

    @classmethod
    def of(cls, model: Any, features: Float[Tensor, "B N C"]) -> Answer:
        """Apply the model's head to the features of its last forward."""
        return cls(model.forward_head(features, pre_logits=True).float(), model.forward_head(features).float())


def consistency_step(
    model: Any,
    images: Tensor,
    target: Tensor,
    *,
    weight: float = 3.0,
    confidence: float = 0.4,
    most: float = 0.5,
    judge: Judge = "student",
) -> dict[str, Tensor]:
    """Run both passes; return their "loss" and its parts "cross_entropy", "teacher" and "consistency".

    The method's own losses (`laconic.losses`) are not included. Afterwards the model holds the history of the student's pass.

    Args:
        model: a reduced model; its schedule is restored afterwards.
        images: [B, channels, height, width].
        target: class indices [B], or class probabilities [B, classes] as mixup and smoothing make them.
        weight: weight of the consistency in the loss.
        confidence: the probability of the label above which an image is confident.
        most: the teacher removes less than this share of the tokens that the student removes.
        judge: the pass whose probability decides.

    Raises:
        ValueError: the model is not reduced, its method decides by itself how many tokens to remove, or an option is invalid.
    """
    teacher = teacher_pass(model, images, most)
    student = Answer.of(model, model.forward_features(images))
    parts = {"cross_entropy": F.cross_entropy(student.logits, target)}
    parts |= consistency_losses(student, teacher, target, confidence, judge)
    return {"loss": parts["cross_entropy"] + parts["teacher"] + weight * parts["consistency"], **parts}


def teacher_pass(model: Any, images: Tensor, most: float = 0.5) -> Answer:
    """Run the teacher's pass, which removes a random share of the student's removed tokens; run it before the student's.

    Raises:
        ValueError: as `consistency_step`; or activations are checkpointed.
    """
    if not 0 < most <= 1:
        raise ValueError(f"most must be a share of the removed tokens, above 0 and up to 1, not {most!r}")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            "consistency runs two passes before one backward, and checkpointed blocks would be recomputed with the schedule of "
            "the second pass; turn checkpointing off (model.set_grad_checkpointing(False))"
        )
    with removing_less(model, most * float(torch.rand(()))):
        return Answer.of(model, model.forward_features(images))


def consistency_losses(
    student: Answer, teacher: Answer, target: Tensor, confidence: float = 0.4, judge: Judge = "student"
) -> dict[str, Tensor]:
    """Return the "teacher" cross-entropy, and the "consistency" of both passes on images where the judge is confident."""
    choice("consistency", "judge", judge, ("student", "teacher"))
    distance = (student.read - teacher.read.detach()).square().mean(1)
    confident = certainty((student if judge == "student" else teacher).logits.detach(), target) > confidence
    consistency = (distance * confident).sum() / confident.sum().clamp_min(1)
    return {"teacher": F.cross_entropy(teacher.logits, target), "consistency": consistency}


def certainty(logits: Float[Tensor, "B K"], target: Tensor) -> Float[Tensor, " B"]:
    """Return the probability of the label; for a mixed image, the sum over its classes.

    The classes of a mixed image are those with more than the smallest target, which is what smoothing gives to every class.
    """
    probability = logits.softmax(1)
    if target.dim() == 1:
        return probability.gather(1, target.unsqueeze(1)).squeeze(1)
    return (probability * (target > target.amin(1, keepdim=True))).sum(1)


@contextmanager
def removing_less(model: nn.Module, share: float) -> Iterator[None]:
    """Inside the context, let a reduced model remove only ``share`` of the tokens that its schedule removes at each block."""
    reduction = reduction_of(model)
    schedule = reduction.schedule
    try:
        reduction.set_schedule(lessened(reduction, share))
        yield
    finally:
        reduction.set_schedule(schedule)


def lessened(reduction: TokenReduction, share: float) -> Schedule:
    """Return the schedule that removes only ``share`` as much.

    The share applies to the counts to remove, to 1 - keep rate, or, for counts to keep, to all tokens removed so far.

    Raises:
        ValueError: the method decides by itself how many tokens to remove.
    """
    schedule = reduction.schedule
    if schedule.unit == "adaptive":
        raise ValueError(f"{reduction.config.info.name} decides by itself how many tokens to remove; give it a keep rate")
    if schedule.unit == "keep":
        return schedule.scaled(lambda keep: 1 - share * (1 - keep))
    counts = dict(zip(schedule.at, map(int, schedule.values), strict=True))
    if schedule.unit == "remove_counts":
        return Schedule.remove_counts({block: int(share * count) for block, count in counts.items()})
    kept = dict[int, int]()
    for block, count in counts.items():
        reducer: Any = reduction.reducer(block)
        patches = math.prod(reducer.site.grid)
        kept[block] = patches - int(share * max(0, patches - count))
    return Schedule.keep_counts(kept)
