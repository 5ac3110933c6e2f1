"""Losses against the unreduced model, as DynamicViT and TPS train with them (beside cross-entropy and `laconic.losses`)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.shape_types import Float


def logit_distillation(student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"]) -> Tensor:
    """KL(teacher || student) of the class probabilities, mean over images, temperature 1."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def token_distillation(
    student: Float[Tensor, "B L C"],
    teacher: Float[Tensor, "B L C"],
    alive: Float[Tensor, "B L"],
    kind: Literal["mse", "kl"] = "mse",
) -> Tensor:
    """Distance of the features of kept tokens to the teacher's at the same places, mean over kept tokens of the batch.

    Features after the final norm, patch tokens only. ``mse`` is DynamicViT's on DeiT (mean over channels too), ``kl`` is
    TPS's: features as distributions over channels. Zero where hardly anything is kept.
    """
    kept = alive.detach() > 0.5
    if kind == "mse":
        each = (student - teacher).square().mean(-1)
    else:
        each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    count = kept.sum()
    return torch.where(count > 0, (each * kept).sum() / count.clamp_min(1), torch.zeros_like(each.sum()))
