"""Stop a run when the loss or the weights are not finite, before they reach a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from laconic.core.files import Refusal
from laconic.training.state import CHECKPOINT


def check_loss(row: Mapping[str, float], step: int, folder: Path) -> None:
    """Raise if the loss is not finite; the weights are not updated yet.

    Raises:
        Refusal: names the part of the loss, and the last checkpoint.
    """
    wrong = [f"{name} {value}" for name, value in row.items() if not math.isfinite(value)]
    if wrong:
        raise _refusal(f"the loss is not finite at step {step} ({', '.join(wrong)})", folder)


def check_weights(model: nn.Module, step: int, folder: Path) -> None:
    """Raise if a weight is not finite (a finite loss can have gradients that are not).

    Raises:
        Refusal: names the first such parameter, and the last checkpoint.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    finite = torch.stack([weight.detach().isfinite().all() for weight in weights])
    if not finite.all():
        first = names[finite.tolist().index(False)]
        raise _refusal(f"the weights are not finite after step {step - 1} ({first} is the first)", folder)


def _refusal(what: str, folder: Path) -> Refusal:
    kept = folder / CHECKPOINT
    last = f"the last good checkpoint is {kept}" if kept.is_file() else "there is no checkpoint yet"
    remedy = "Try a lower optimization.lr, a longer warm-up, optimization.clip_grad=1, or precision without fp16"
    return Refusal(f"{what}; {last}. {remedy}")
