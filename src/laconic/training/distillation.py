"""Distillation losses from the unreduced model, as in DynamicViT and TPS; cross-entropy and `laconic.losses` come on top."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.core.shape_types import Float


def logit_distillation(student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"]) -> Tensor:
    """Return KL(teacher || student) of the class probabilities, mean over images, temperature 1."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def token_distillation(
    student: Float[Tensor, "B L C"],
    teacher: Float[Tensor, "B L C"],
    alive: Float[Tensor, "B L"],
    kind: Literal["mse", "kl"] = "mse",
) -> Tensor:
    """Return the distance of kept tokens' features to the teacher's at the same positions, mean over the batch's kept tokens.

    Features are taken after the final norm, patch tokens only. ``alive`` is the keep mask; tokens above 0.5 are kept. ``mse``
    is DynamicViT's loss on DeiT (mean over channels too), ``kl`` that of TPS: features as distributions over channels. The
    loss is zero if no token is kept.
    """
    kept = alive.detach() > 0.5
    if kind == "mse":
        each = (student - teacher).square().mean(-1)
    else:
        each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    count = kept.sum()
    return torch.where(count > 0, (each * kept).sum() / count.clamp_min(1), torch.zeros_like(each.sum()))
