"""What is minimised: cross-entropy, the method's own losses, and distillation from the unreduced model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.analysis.provenance import losses as own_losses
from laconic.core.gather import gather_rows
from laconic.core.token_reduction import find_reduction
from laconic.methods.ops import CLASS_LOGITS
from laconic.methods.spvit import PACKAGE
from laconic.training.distillation import logit_distillation, token_distillation
from laconic.training.recipe import LossPart, Recipe
from laconic.training.token_labels import TokenLabels


@runtime_checkable
class Change(Protocol):
    """What changes in a run from step to step, as a function of the step alone."""

    def set(self, step: int) -> None:
        """As it is in a step (from 0)."""

    def arrived(self, step: int) -> bool:
        """Whether it is in that step as it will be in the end."""

    def finish(self) -> None:
        """As it is in the end, whatever the step."""


@dataclass(frozen=True)
class StepOptions:
    """What a recipe may say under ``step.options``; the ordinary step has none."""

    @property
    def unused(self) -> bool:
        """Whether parameters may have no part in a step: processes that train together must know."""
        return False

    def check(self, recipe: Recipe) -> None:
        """Refuse what of the recipe does not go with them (ValueError)."""


class Step(nn.Module):
    """How a step is made: called with images, targets and (or None) the classes of patches, it gives the loss and its parts."""

    def changes(self, models: Sequence[nn.Module], steps: int, epochs: int) -> list[Change]:
        """What it changes in the course of a run, in the model and in its moving average: ``steps`` in each of ``epochs``."""
        return []

    def product(self, model: nn.Module) -> nn.Module:
        """What has come out for a trained model (or its moving average): what is validated, and written."""
        return model


class Answer(NamedTuple):
    """What a model says: features after the last block, and logits in float32."""

    features: Tensor
    logits: Tensor


class Objective(Step):
    """A model with its loss, as one module, so that data-parallel wrappers see the whole forward.

    Args:
        student: the model that is trained, reduced or not.
        teacher: the unreduced model, where the weights ask for distillation; it is not trained and not saved.
        weights: what each part of the loss counts.
        token_labels: the head for token labelling, where the recipe wants it.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, weights: LossPart, token_labels: TokenLabels | None = None
    ) -> None:
        super().__init__()
        self.student, self.weights, self.token_labels = student, weights, token_labels
        if teacher is None and (weights.logits or weights.tokens):
            raise ValueError("distillation needs a teacher, the unreduced model; set loss.logits and loss.tokens to 0 without")
        object.__setattr__(self, "teacher", teacher)  # not a child: neither trained nor synchronised

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and its parts, each a mean over the images.

        ``target`` is class numbers [B] or shares [B, classes]; ``patches`` the classes of the patches [B, P].
        """
        return self.losses(images, self.answer(images), target, patches)

    def answer(self, images: Tensor) -> Answer:
        """What the model says of images [B, channels, height, width]."""
        model: Any = self.student
        features = model.forward_features(images)
        return Answer(features, model.forward_head(features).float())

    def losses(self, images: Tensor, answer: Answer, target: Tensor, patches: Tensor | None) -> dict[str, Tensor]:
        """As `forward`, for an answer that has just been given."""
        model: Any = self.student
        features, logits = answer
        parts = {"cross_entropy": cross_entropy(logits, target)}
        total = parts["cross_entropy"]
        if (reduction := find_reduction(model)) is not None:
            own, notes = reduction.config.loss_weights(), reduction.entry(reduction.depth).per_image
            total = own.get("cross_entropy", 1.0) * total
            if CLASS_LOGITS in notes:
                parts[CLASS_LOGITS] = cross_entropy(notes[CLASS_LOGITS].float(), target)
                total = total + own.get(CLASS_LOGITS, 1.0) * parts[CLASS_LOGITS]
            for name, value in own_losses(model).items():
                parts[name] = value
                total = total + own.get(name, self.weights.ratio) * value
        for name, value in self._distilled(images, features, logits).items():
            parts[name] = value
            total = total + getattr(self.weights, name) * value
        if self.token_labels is not None and patches is not None:
            parts["token_labels"] = self.token_labels(features[:, model.num_prefix_tokens :], patches)
            total = total + self.weights.token_labels * parts["token_labels"]
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}

    def _distilled(self, images: Tensor, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        teacher: Any = self.teacher
        if teacher is None:
            return {}
        with torch.no_grad():
            wanted = teacher.forward_features(images)
            wanted_logits = teacher.forward_head(wanted).float()
        out = {}
        if self.weights.logits:
            out["logits"] = logit_distillation(logits, wanted_logits)
        if self.weights.tokens:
            out["tokens"] = self._tokens(features.float(), wanted.float())
        return out

    def _tokens(self, features: Tensor, wanted: Tensor) -> Tensor:
        """Token distillation: every token that is left and has a place of its own, against the teacher's in that place."""
        reduction = find_reduction(self.student)
        prefix = 0 if reduction is None else reduction.prefix
        own, wanted = features[:, prefix:], wanted[:, prefix:]
        alive = torch.ones_like(own[..., 0])
        if reduction is not None and not reduction.restore:
            left = reduction.entry(reduction.depth)
            wanted = wanted if left.origin is None else gather_rows(wanted, left.origin_index)
            alive = alive if left.keep_mask is None else left.keep_mask
            if PACKAGE in left.per_token:  # they have no place of their own
                alive = alive * (1 - left.per_token[PACKAGE])
        return token_distillation(own, wanted, alive, self.weights.token_kind)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with class numbers [B], or with shares of the classes [B, C] as mixup and smoothing make them."""
    return F.cross_entropy(logits, target)
