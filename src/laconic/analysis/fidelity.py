"""Fidelity: how near the features of a reduced model, or of a smaller input, are to those of the unreduced model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from laconic.core.shape_types import Float


def class_cosine(base: Float[Tensor, "B C"], features: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """Return the cosine of each image's feature (class token, pooled, logits) to the unreduced model's, in float32."""
    return F.cosine_similarity(base.float(), features.float(), dim=-1)


def patch_cosine(base: Float[Tensor, "B P C"], features: Float[Tensor, "B Q C"]) -> Float[Tensor, " B"]:
    """Return the cosine of patch features to the unreduced model's, mean over the patches, in float32.

    Features of another square grid (of a smaller input) are first resized to the grid of ``base``, bilinearly.

    Raises:
        ValueError: the numbers of patches differ and are not both squares.
    """
    if features.shape[1] != base.shape[1]:
        features = resized(features, base.shape[1])
    return F.cosine_similarity(base.float(), features.float(), dim=-1).mean(1)


def resized(features: Float[Tensor, "B Q C"], patches: int) -> Float[Tensor, "B P C"]:
    """Resize the features of a square grid of patches bilinearly to another square grid, in float32."""
    old, new = round(features.shape[1] ** 0.5), round(patches**0.5)
    if old * old != features.shape[1] or new * new != patches:
        raise ValueError(f"expected square grids of patches, not {features.shape[1]} and {patches} patches")
    image = features.float().transpose(1, 2).reshape(len(features), -1, old, old)
    return F.interpolate(image, size=(new, new), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def map_correlation(base: Float[Tensor, " B *S"], maps: Float[Tensor, " B *S"]) -> Float[Tensor, " B"]:
    """Return Pearson's correlation of each map (of a dense head, of any shape) with the unreduced model's, in float32."""
    one, two = (values.float().flatten(1) for values in (base, maps))
    return F.cosine_similarity(one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True), dim=1)
