"""Quality of a model's answers: agreement with the unreduced model, and accuracy if the labels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.analysis.accuracy import Accuracy
from laconic.cli.image_io import Photo
from laconic.cli.patch_outcomes import Outcomes
from laconic.training.distillation import logit_distillation


@dataclass(frozen=True)
class Agreement:
    """Agreement of a model with the unreduced one, mean over the images; None if it is not defined."""

    cosine: float | None = None  # of the features before the head
    kl: float | None = None  # of the class probabilities, KL(unreduced || this)
    top1: float | None = None  # share of images with the same first class


@dataclass(frozen=True)
class Judged:
    """Quality of a model's answers: accuracy if labels are known, outcomes of patches if the object's place is."""

    agreement: Agreement = Agreement()
    accuracy: Accuracy | None = None
    outcomes: Outcomes | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        accuracy, outcomes = self.accuracy, self.outcomes
        out: dict[str, Any] = {"agreement": asdict(self.agreement)}
        out["accuracy"] = None if accuracy is None else accuracy.to_json()
        out["fate"] = None if outcomes is None else outcomes.to_json()  # the key is that of version 0.1
        return out


@dataclass(frozen=True)
class Answers:
    """Features before the head, and the logits of the head, in float32."""

    features: Tensor
    logits: Tensor
    classes: int  # 0: the model has no head


def answers(model: Any, read: Sequence[Photo], image: tuple[int, int]) -> Answers:
    """Return the answers to photographs of a model that takes images of this size."""
    pixels = torch.stack([photo.pixels for photo in read])
    if tuple(pixels.shape[2:]) != image:
        pixels = F.interpolate(pixels, image, mode="bicubic", antialias=True)
    with torch.inference_mode():
        tokens = model.forward_features(pixels)
        features, logits = model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)
    return Answers(features.float(), logits.float(), getattr(model, "num_classes", 0))


def agree(own: Answers, full: Answers) -> Agreement:
    """Compare the answers of a model with those of the unreduced one."""
    cosine = kl = top1 = None
    if own.features.shape == full.features.shape:
        cosine = F.cosine_similarity(own.features, full.features).mean().item()
    if own.classes == full.classes > 0:
        kl = logit_distillation(own.logits, full.logits).item()
        top1 = (own.logits.argmax(1) == full.logits.argmax(1)).float().mean().item()
    return Agreement(cosine, kl, top1)
