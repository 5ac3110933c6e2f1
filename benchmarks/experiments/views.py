"""Measure what a reduced model keeps of an image: the diversity of its last tokens and the share of the object."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laconic.analysis.break_even import stepping
from laconic.analysis.diversity import diversity_score
from laconic.analysis.evaluate import transform_for
from laconic.analysis.provenance import provenance
from laconic.cli.patch_outcomes import outcomes
from laconic.core.token_reduction import reduction_of
from laconic.data import ImageSet
from laconic.data.generated import Scenes
from laconic.training.token_labels import patch_labels

IMAGES = 200  # measured, of the test split


def look(model: nn.Module, images: ImageSet) -> dict[str, float]:
    """Return means over the first images: diversity of the last tokens (BAT eq. 4), kept shares of object and background.

    A patch is ``own`` if it is the origin of a kept token, and ``held`` if any token holds it (merged ones included).
    """
    if not isinstance(images, Scenes):
        raise ValueError(
            "expected images of the generated benchmark (scenes): only for these the position of the object is known"
        )
    reduction, transform, seen = reduction_of(model), transform_for(model), list[torch.Tensor]()
    pixels = torch.stack([transform(images[i][0]) for i in range(IMAGES)])

    def record(own: Any, *arguments: Any) -> Any:
        after = own(*arguments)
        seen.append(after.patches)
        return after

    with stepping(reduction, record), torch.inference_mode():
        model(pixels)
    last = provenance(model).final
    rows, columns = reduction.grid
    objects = patch_labels(images, list(range(IMAGES)), (rows, columns)) < len(images.classes)
    kept, merged, _ = outcomes(last).float().unbind(2)
    shares = {"own": kept, "held": kept + merged}
    out = {"diversity": diversity_score(seen[-1]).mean().item()} if seen else {}
    for name, share in shares.items():
        out[f"object_{name}"] = share[objects].mean().item()
        out[f"surroundings_{name}"] = share[~objects].mean().item()
    return out
