"""A-ViT's second loss: the distance of the blocks' halting scores from a target distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def depth_target(depth: int, center: int, blocks: Sequence[int], like: Tensor) -> Tensor:
    """Return the target halting score of each of ``blocks``: a Gaussian whose first ``center`` blocks sum to 0.98."""
    places = torch.arange(depth, device=like.device, dtype=torch.float32)
    log = -(places - center).square() / 2
    picked = torch.stack([log[block] for block in blocks])
    return 0.98 * (picked - log[:center].logsumexp(0)).exp()


def halting_divergence(score: Tensor, target: Tensor) -> Tensor:
    """Return KL(target || shares of the scores) / number of blocks, clamped at zero (the target does not sum to one)."""
    share = (score / score.sum().clamp_min(torch.finfo(score.dtype).tiny)).clamp(0.01, 0.99)
    return (torch.xlogy(target, target) - target * share.log()).mean().clamp_min(0)
