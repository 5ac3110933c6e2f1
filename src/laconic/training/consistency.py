"""MCTF's own training (Lee et al., CVPR 2024, arXiv:2403.10030): a second pass that takes away fewer tokens teaches the first.

For each batch a share is drawn evenly from [0, ``most``), and the teacher's pass takes away that share of what the
schedule does at each block (whole tokens, rounded down). Both passes have gradients of their own cross-entropy; beside,

    consistency = mean over the images that are answered with confidence of |f - f'|^2 / C,

f and f' what the head reads of student and teacher (the class token after the last norm, or pooled features), f' without a
gradient. Loss = cross_entropy + teacher + 3 consistency. An image counts if the probability of its label is above 0.4.

    losses = consistency_step(model, images, labels)
    losses["loss"].backward()

Published: 30 epochs; for r=16 the teacher takes 0 to 7 tokens, for a share of 0.35 up to 0.15 (``most=3/7``). In the published
code it is the student whose confidence counts (``judge``), and the probabilities of both classes of a mixed image add up; of
twice the same class they count that probability twice, here once. Any method with a schedule can be trained like this.
"""

from __future__ import annotations

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
    """What one pass says of the images."""

    read: Float[Tensor, "B C"]  # by the head
    logits: Float[Tensor, "B K"]

    @classmethod
    def of(cls, model: Any, features: Float[Tensor, "B N C"]) -> Answer:
        """By the head, of the features that the model's last forward left."""
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
    """Both passes and their "loss", with its parts "cross_entropy", "teacher" and "consistency"; the ledger is the student's.

    Losses of the method's own (`laconic.losses`) are not among them.

    Args:
        model: a reduced model; its schedule is put back.
        images: [B, channels, height, width].
        target: class numbers [B], or shares of the classes [B, classes] as mixup and smoothing make them.
        weight: of the consistency in the loss.
        confidence: the probability of its label that an image must have to count.
        most: the teacher takes away less than this share of what the student does.
        judge: whose probability it is.

    Raises:
        ValueError: the model is not reduced, or decides alone how much it takes away; an option does not fit.
    """
    teacher = teacher_pass(model, images, most)
    student = Answer.of(model, model.forward_features(images))
    parts = {"cross_entropy": F.cross_entropy(student.logits, target)}
    parts |= consistency_losses(student, teacher, target, confidence, judge)
    return {"loss": parts["cross_entropy"] + parts["teacher"] + weight * parts["consistency"], **parts}


def teacher_pass(model: Any, images: Tensor, most: float = 0.5) -> Answer:
    """The pass that takes away fewer tokens, as many fewer as is drawn now; to be run before the student's.

    Raises:
        ValueError: as `consistency_step`; or activations are checkpointed.
    """
    if not 0 < most <= 1:
        raise ValueError(f"most is a share of the tokens that leave, above 0 and up to 1, not {most!r}")
    if getattr(model, "grad_checkpointing", False):
        raise ValueError(
            "consistency takes two passes before one backward, and checkpointed blocks would all be run again by the second's "
            "schedule; switch it off (model.set_grad_checkpointing(False))"
        )
    with taking_less(model, most * float(torch.rand(()))):
        return Answer.of(model, model.forward_features(images))


def consistency_losses(
    student: Answer, teacher: Answer, target: Tensor, confidence: float = 0.4, judge: Judge = "student"
) -> dict[str, Tensor]:
    """The "teacher"'s cross-entropy, and the "consistency" of the student with it where the judge is confident."""
    choice("consistency", "judge", judge, ("student", "teacher"))
    apart = (student.read - teacher.read.detach()).square().mean(1)
    sure = certainty((student if judge == "student" else teacher).logits.detach(), target) > confidence
    consistency = (apart * sure).sum() / sure.sum().clamp_min(1)
    return {"teacher": F.cross_entropy(teacher.logits, target), "consistency": consistency}


def certainty(logits: Float[Tensor, "B K"], target: Tensor) -> Float[Tensor, " B"]:
    """The probability of the label; of a mixed image, of all classes in it (those with more than smoothing gives to each)."""
    probability = logits.softmax(1)
    if target.dim() == 1:
        return probability.gather(1, target.unsqueeze(1)).squeeze(1)
    return (probability * (target > target.amin(1, keepdim=True))).sum(1)


@contextmanager
def taking_less(model: nn.Module, share: float) -> Iterator[None]:
    """For a while, a reduced model takes away only that share of the tokens at each block."""
    reduction = reduction_of(model)
    schedule = reduction.schedule
    try:
        reduction.set_schedule(lessened(reduction, share))
        yield
    finally:
        reduction.set_schedule(schedule)


def lessened(reduction: TokenReduction, share: float) -> Schedule:
    """The schedule that takes away that share: of counts to remove, of 1 - the keep rate, or of all that left so far.

    Raises:
        ValueError: there is no schedule: the method decides.
    """
    schedule = reduction.schedule
    if schedule.unit == "adaptive":
        raise ValueError(f"{reduction.config.info.name} decides alone how many tokens it takes away; give it a keep rate")
    if schedule.unit == "keep":
        return schedule.scaled(lambda keep: 1 - share * (1 - keep))
    counts = dict(zip(schedule.at, map(int, schedule.values), strict=True))
    if schedule.unit == "remove_counts":
        return Schedule.remove_counts({block: int(share * count) for block, count in counts.items()})
    left = dict[int, int]()
    for block, count in counts.items():
        reducer: Any = reduction.reducer(block)
        patches = reducer.site.grid[0] * reducer.site.grid[1]
        left[block] = patches - int(share * max(0, patches - count))
    return Schedule.keep_counts(left)
