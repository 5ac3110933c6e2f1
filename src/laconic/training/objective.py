"""What is minimised: cross-entropy, the method's own losses, and distillation from the unreduced model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.compression import find_compression
from laconic.distill import logit_distillation, token_distillation
from laconic.recipe import LossPart
from laconic.rows import take
from laconic.training.token_labels import TokenLabels


class Objective(nn.Module):
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
        model: Any = self.student
        features = model.forward_features(images)
        logits = model.forward_head(features).float()
        parts = {"cross_entropy": cross_entropy(logits, target)}
        total = parts["cross_entropy"]
        if (compression := find_compression(model)) is not None:
            own = compression.config.loss_weights()
            for name, value in compression.losses().items():
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
        """Token distillation: every token that is left against the teacher's in the same place."""
        compression = find_compression(self.student)
        prefix = 0 if compression is None else compression.prefix
        own, wanted = features[:, prefix:], wanted[:, prefix:]
        alive = torch.ones_like(own[..., 0])
        if compression is not None:
            left = compression.entry(compression.depth)
            wanted = wanted if left.patch is None else take(wanted, left.place)
            alive = alive if left.alive is None else left.alive
        return token_distillation(own, wanted, alive, self.weights.token_kind)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with class numbers [B], or with shares of the classes [B, C] as mixup and smoothing make them."""
    return F.cross_entropy(logits, target)
