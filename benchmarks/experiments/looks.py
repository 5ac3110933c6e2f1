"""What a reduced model keeps of the pictures: how different its last tokens are, how much of the object is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laconic.analysis.break_even import stepping
from laconic.analysis.diversity import diversity_score
from laconic.analysis.evaluate import transform_for
from laconic.analysis.provenance import provenance
from laconic.cli.patch_outcomes import fates
from laconic.core.token_reduction import reduction_of
from laconic.data import ImageSet
from laconic.data.generated import Scenes
from laconic.training.token_labels import patch_labels

LOOKED_AT = 200  # images


def look(model: nn.Module, images: ImageSet) -> dict[str, float]:
    """Means over the first images: diversity of the last tokens (BAT eq. 4), patches of object and surroundings left.

    A patch is ``own`` where a token still stands in its place, ``held`` where it is in some token (merged ones too).
    """
    if not isinstance(images, Scenes):
        raise ValueError("only the generated benchmark knows where its objects are")
    reduction, transform, seen = reduction_of(model), transform_for(model), list[torch.Tensor]()
    pixels = torch.stack([transform(images[i][0]) for i in range(LOOKED_AT)])

    def look(own: Any, *arguments: Any) -> Any:
        after = own(*arguments)
        seen.append(after.patches)
        return after

    with stepping(reduction, look), torch.inference_mode():
        model(pixels)
    last = provenance(model).final
    objects = patch_labels(images, list(range(LOOKED_AT)), reduction.grid) < len(images.classes)
    kept, merged, _ = fates(last).float().unbind(2)
    shares = {"own": kept, "held": kept + merged}
    out = {"diversity": diversity_score(seen[-1]).mean().item()} if seen else {}
    for name, share in shares.items():
        out[f"object_{name}"] = share[objects].mean().item()
        out[f"surroundings_{name}"] = share[~objects].mean().item()
    return out
