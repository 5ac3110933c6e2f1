"""The training objective: cross-entropy, the method's own losses, and distillation from the unreduced model."""

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
from laconic.training.balance import weighted_cross_entropy
from laconic.training.distillation import logit_distillation, token_distillation
from laconic.training.recipe import LossPart, Recipe
from laconic.training.token_labels import TokenLabels


@runtime_checkable
class Change(Protocol):
    """A setting that changes over the steps of a run, as a function of the step alone."""

    def set(self, step: int) -> None:
        """Set the value of a step (from 0)."""

    def arrived(self, step: int) -> bool:
        """Return True if the value at that step is the final one."""

    def finish(self) -> None:
        """Set the final value."""


@dataclass(frozen=True)
class StepOptions:
    """The options of a step, from a recipe's ``step.options``; the ordinary step has none."""

    @property
    def unused(self) -> bool:
        """True if a step may not use all parameters; data-parallel training needs to know."""
        return False

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError if the recipe does not fit these options."""


class Step(nn.Module):
    """The computation of a training step: maps images, targets and patch classes (or None) to the loss and its parts."""

    def changes(self, models: Sequence[nn.Module], steps: int, epochs: int) -> list[Change]:
        """Return the changes over a run of ``epochs`` with ``steps`` each, for the model and its moving average."""
        return []

    def product(self, model: nn.Module) -> nn.Module:
        """Return the model to validate and write, from the trained model or its moving average."""
        return model


class Answer(NamedTuple):
    """The output of a model: features after the last block, and logits in float32."""

    features: Tensor
    logits: Tensor


class Objective(Step):
    """A model and its loss as one module, so that data-parallel wrappers cover the whole forward.

    Args:
        student: the model that is trained, reduced or not.
        teacher: the unreduced model, if the weights include distillation; it is neither trained nor saved.
        weights: the weight of each part of the loss.
        token_labels: the head for token labelling, if the recipe uses it.
        class_weights: the weight of every class in the cross-entropies, [classes].

    Raises:
        ValueError: the weights include distillation, and there is no teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        weights: LossPart,
        token_labels: TokenLabels | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.student, self.weights, self.token_labels = student, weights, token_labels
        if teacher is None and (weights.logits or weights.tokens):
            raise ValueError("distillation needs a teacher, the unreduced model; set loss.logits and loss.tokens to 0 without")
        object.__setattr__(self, "teacher", teacher)  # not a child: neither trained nor synchronised

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss and its parts, each a mean over the images.

        ``target`` is class indices [B] or probabilities [B, classes]; ``patches`` the classes of the patches [B, P].
        """
        return self.losses(images, self.answer(images), target, patches)

    def answer(self, images: Tensor) -> Answer:
        """Run the model on images [B, channels, height, width]."""
        model: Any = self.student
        features = model.forward_features(images)
        return Answer(features, model.forward_head(features).float())

    def losses(self, images: Tensor, answer: Answer, target: Tensor, patches: Tensor | None) -> dict[str, Tensor]:
        """Return the loss and its parts as `forward`, for an output that the model has just computed."""
        model: Any = self.student
        features, logits = answer
        parts = {"cross_entropy": self.cross_entropy(logits, target)}
        total = parts["cross_entropy"]
        if (reduction := find_reduction(model)) is not None:
            own, notes = reduction.config.loss_weights(), reduction.entry(reduction.depth).per_image
            total = own.get("cross_entropy", 1.0) * total
            if CLASS_LOGITS in notes:
                parts[CLASS_LOGITS] = self.cross_entropy(notes[CLASS_LOGITS].float(), target)
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

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy with class indices [B], or class probabilities [B, C] as mixup and smoothing make them."""
        if self.class_weights is None:
            return cross_entropy(logits, target)
        return weighted_cross_entropy(logits, target, self.class_weights)

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
        """Return the token distillation: each kept token that has a position, against the teacher's token at that position."""
        reduction = find_reduction(self.student)
        prefix = 0 if reduction is None else reduction.prefix
        own, wanted = features[:, prefix:], wanted[:, prefix:]
        alive = torch.ones_like(own[..., 0])
        if reduction is not None and not reduction.restore:
            last = reduction.entry(reduction.depth)
            wanted = wanted if last.origin is None else gather_rows(wanted, last.origin_index)
            alive = alive if last.keep_mask is None else last.keep_mask
            if PACKAGE in last.per_token:  # package tokens have no position
                alive = alive * (1 - last.per_token[PACKAGE])
        return token_distillation(own, wanted, alive, self.weights.token_kind)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the unweighted cross-entropy, a mean over the images."""
    return F.cross_entropy(logits, target)
