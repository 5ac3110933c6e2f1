"""The input pipeline of training: augmentation of images, mixing of batches, and their random seeds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.training.recipe import AugmentationPart


def seed_everything(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train_transform(model: nn.Module, part: AugmentationPart) -> Callable[[Any], Tensor]:
    """Return timm's augmentation for a recipe, for images of the model's own size; without ``crop`` only flips.

    Raises:
        ValueError: the recipe has augmentation that timm applies to crops only, and no crop.
    """
    from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
    from torchvision.transforms import (  # type: ignore[import-untyped]
        Compose,
        RandomHorizontalFlip,
        RandomVerticalFlip,
    )

    from laconic.analysis.evaluate import transform_for

    if part.crop is None:
        wanted = [name for name in ("color_jitter", "auto_augment", "erase") if getattr(part, name)]
        if wanted:
            raise ValueError(f"augmentation.{wanted[0]} needs augmentation.crop, for example [0.08, 1.0]")
        return Compose([RandomHorizontalFlip(part.hflip), RandomVerticalFlip(part.vflip), transform_for(model)])
    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    from laconic.core.backbone import find_host

    host, entry = find_host(model)
    made: Callable[[Any], Tensor] = create_transform(
        input_size=(3, *entry.example(host).shape[2:]),
        is_training=True,
        scale=part.crop,
        hflip=part.hflip,
        vflip=part.vflip,
        color_jitter=part.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=part.auto_augment or None,
        interpolation="bicubic",
        mean=config["mean"],
        std=config["std"],
        re_prob=part.erase,
        re_mode=part.erase_mode,
    )
    return made


def mixer(part: AugmentationPart, classes: int, share: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the function that mixes ``share`` images and class indices at a time.

    It applies timm's mixup and cutmix, or only label smoothing, or nothing.

    Raises:
        ValueError: images are mixed in pairs, and ``share`` is odd.
    """
    if not (part.mixup or part.cutmix):
        if not part.smoothing:
            return lambda pixels, labels: (pixels, labels)

        def smooth(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            even = torch.full((len(labels), classes), part.smoothing / classes, device=labels.device)
            return pixels, even.scatter(1, labels[:, None], 1 - part.smoothing + part.smoothing / classes)

        return smooth
    from timm.data import Mixup  # type: ignore[attr-defined]

    if share % 2:
        raise ValueError(
            f"augmentation.mixup and cutmix mix images in pairs, and a process gets {share} at a time; change "
            "optimization.batch_size or --accumulate so that it is an even number"
        )
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=part.mixup,
        cutmix_alpha=part.cutmix,
        prob=part.mixup_prob,
        switch_prob=part.switch,
        label_smoothing=part.smoothing,
        num_classes=classes,
    )
    return mix
