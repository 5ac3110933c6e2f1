"""Training on imbalanced classes: weights of the classes in the cross-entropy, and how often each image is drawn."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.data import ImageSet

ClassWeights = Literal["none", "balanced", "square-root"]
Sampling = Literal["uniform", "balanced"]
MOST_DRAWN = 2**24  # images that torch.multinomial can draw from


def class_weights(images: ImageSet, name: ClassWeights) -> Tensor | None:
    """Return the weight of every class in the cross-entropy, [classes]; None for ``none``.

    ``balanced`` is images / (classes * images of the class), as in scikit-learn; ``square-root`` is proportional to the square
    root of that. The mean over the images is 1, so that the learning rate keeps its meaning. A class without images has 0.
    """
    if name == "none":
        return None
    counts = _labels(images).bincount(minlength=len(images.classes)).double()
    inverse = torch.where(counts > 0, 1 / counts.clamp_min(1), 0)
    weights = inverse if name == "balanced" else inverse.sqrt()
    return (weights * counts.sum() / (weights * counts).sum()).float()


def draw_weights(images: ImageSet, name: Sampling) -> Tensor | None:
    """Return the weight with which each image is drawn, [images], so that all classes are drawn equally often.

    None for ``uniform``: then every image is drawn once an epoch.

    Raises:
        ValueError: there are more images than torch can draw from.
    """
    if name == "uniform":
        return None
    if len(images) > MOST_DRAWN:
        raise ValueError(
            f"data.sampler=balanced draws from at most {MOST_DRAWN:,} images, and there are {len(images):,}; set "
            "loss.class_weights=balanced instead"
        )
    labels = _labels(images)
    return (1 / labels.bincount(minlength=len(images.classes)).double())[labels]


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the cross-entropy, a mean over the images, with class indices [B] or probabilities [B, C].

    The sum is divided by the number of images, not by the sum of their weights as torch does: so a batch gives
    the same loss in one piece and in several.
    """
    return F.cross_entropy(logits, target, weight=weights, reduction="sum") / len(logits)


def _labels(images: ImageSet) -> Tensor:
    return torch.tensor(list(images.labels_of_all()), dtype=torch.long)
