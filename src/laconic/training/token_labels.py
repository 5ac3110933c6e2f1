"""Token labelling (Jiang et al., NeurIPS 2021, arXiv:2104.10858): every patch token is classified by its patch.

LV-ViT is trained with labels from a stronger model. The generated images come with masks of their objects, so the labels
are exact: the object's class if the object covers more than `COVERED` of a patch, else an additional class for background.
The head is discarded after training. A small transformer learns several times as fast from such labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.data import ImageSet
from laconic.data.generated import Scenes

COVERED = 0.4  # a patch has the object's class if the object covers more than this share of it


class TokenLabels(nn.Module):
    """A head for patch tokens, and its loss."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes + 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy, mean over all patches: ``features`` [B, P, C], ``labels`` [B, P]."""
        return F.cross_entropy(self.head(features).float().flatten(0, 1), labels.flatten())


def patch_labels(images: ImageSet, numbers: list[int], grid: tuple[int, int]) -> Tensor:
    """Return the class of every patch of these images, [B, P]; background is the last class.

    Raises:
        ValueError: the images have no masks of their objects.
    """
    if not isinstance(images, Scenes):
        raise ValueError("loss.token_labels needs images with masks of their objects: set data.name='scenes'")
    rows = []
    for number in numbers:
        scene = images.scene(number)
        covered = F.adaptive_avg_pool2d(torch.from_numpy(scene.mask.astype("float32"))[None], grid).flatten()
        rows.append(torch.where(covered > COVERED, scene.label, len(images.classes)))
    return torch.stack(rows)


def head_for(model: Any, weight: float, classes: int) -> TokenLabels | None:
    """Return the head for a model; None if ``weight`` is 0.

    Raises:
        ValueError: the model is reduced, so its tokens are not patches.
    """
    from laconic.core.token_reduction import find_reduction

    if not weight:
        return None
    if find_reduction(model) is not None:
        raise ValueError("loss.token_labels is for unreduced models; remove it if a method is trained")
    return TokenLabels(model.embed_dim, classes)
