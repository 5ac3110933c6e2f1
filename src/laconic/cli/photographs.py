"""Photographs of scikit-image as square pictures, and the features that a model computes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.analysis.provenance import restore_dense
from laconic.core.files import Refusal
from laconic.core.token_reduction import find_reduction

NAMES = (  # files of scikit-image's wheel, without suffix
    *("coffee", "astronaut", "chelsea", "rocket", "motorcycle_left", "camera", "hubble_deep_field", "retina", "ihc"),
    *("coins", "moon", "brick", "grass", "gravel", "clock_motion"),
)
BATCH = 10


def squares(names: Sequence[str] = NAMES, seed: int = 0) -> list[Any]:
    """Return each photograph, cropped to a square, followed by a smaller random crop of it, as PIL images in RGB.

    Raises:
        Refusal: scikit-image is not installed, or a photograph is not in its wheel.
    """
    from PIL import Image

    try:
        import skimage
    except ImportError as error:
        raise Refusal('the photographs come with scikit-image: pip install "laconic[demo]"') from error
    draw, found = random.Random(seed), []
    for name in names:
        file = next((Path(skimage.__file__).parent / "data").glob(f"{name}.*"), None)
        if file is None:
            raise Refusal(f"this scikit-image has no photograph {name} in its wheel; install scikit-image 0.26")
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        found.append(image.crop((left, top, left + side, top + side)))
        side = int(side * draw.uniform(0.5, 0.9))
        left, top = draw.randint(0, image.width - side), draw.randint(0, image.height - side)
        found.append(image.crop((left, top, left + side, top + side)))
    return found


def pixels(image: Any, size: int) -> Tensor:
    """Resize a square picture and normalise it with ImageNet's mean and standard deviation: [3, size, size]."""
    from PIL import Image
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    values = torch.tensor(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (values - mean) / std


def tokens_of(model: Any, pictures: Tensor) -> Tensor:
    """Return all output tokens, [N, 1 + P, C], of square pictures [N, 3, S, S]; those of a reduced model are restored.

    Dropped patches get the features of the nearest patch that a token holds.
    """
    found = []
    with torch.inference_mode():
        for batch in torch.split(pictures, BATCH):
            tokens = model.forward_features(batch)
            if find_reduction(model) is not None:
                tokens = torch.cat([tokens[:, :1], restore_dense(model, tokens, fill="nearest")], 1)
            found.append(tokens)
    return torch.cat(found)


def saliency(decoder: nn.Module, patches: Tensor) -> Tensor:
    """Return the maps [N, S, S] that a decoder makes of patch features [N, P, C] of a square grid."""
    side = round(patches.shape[1] ** 0.5)
    with torch.inference_mode():
        found: Tensor = decoder(patches.transpose(1, 2).reshape(len(patches), -1, side, side))
    return found[:, 0]
