"""Token labelling (Jiang et al., NeurIPS 2021, arXiv:2104.10858): every patch token says what its patch shows.

LV-ViT is trained with it, with labels that a stronger model made. The generated benchmark knows where its object is, so
there the labels are exact: the object's class where it covers most of a patch, and one more class for the background. The
head that answers is thrown away after training. A small transformer learns from such labels several times as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laconic.data import ImageSet
from laconic.data.generated import Scenes

COVERED = 0.4  # share of a patch that the object covers, for the patch to show it


class TokenLabels(nn.Module):
    """A head for patch tokens, and its loss."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes + 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over all patches: ``features`` [B, P, C], ``labels`` [B, P]."""
        return F.cross_entropy(self.head(features).float().flatten(0, 1), labels.flatten())


def patch_labels(images: ImageSet, numbers: list[int], grid: tuple[int, int]) -> Tensor:
    """What every patch of these images shows, [B, P]: a class, or as the last one the background.

    Raises:
        ValueError: the set of images does not know where its objects are.
    """
    if not isinstance(images, Scenes):
        raise ValueError("loss.token_labels needs images that know where their object is: data.name='scenes'")
    rows = []
    for number in numbers:
        scene = images.scene(number)
        covered = F.adaptive_avg_pool2d(torch.from_numpy(scene.mask.astype("float32"))[None], grid).flatten()
        rows.append(torch.where(covered > COVERED, scene.label, len(images.classes)))
    return torch.stack(rows)


def head_for(model: Any, weight: float, classes: int) -> TokenLabels | None:
    """The head for a model, where the recipe wants one.

    Raises:
        ValueError: the model is reduced: its tokens are not patches.
    """
    from laconic.core.token_reduction import find_reduction

    if not weight:
        return None
    if find_reduction(model) is not None:
        raise ValueError("loss.token_labels is for unreduced models; leave it out where a method is trained")
    return TokenLabels(model.embed_dim, classes)
