"""How IA-RED2's interpreters learn (Pan et al., NeurIPS 2021, arXiv:2106.12620, sec. 3.3): by REINFORCE, group after group.

An image is answered twice: with tokens drawn by the interpreters' probabilities, and with those of inference. For each
group, where a share u of the patches stays, the reward is 1 - u^2 if the answer is right, else -penalty; what the first
answer is rewarded with beyond the second multiplies the gradient of the log-probability of its draws (self-critical
baseline). The baseline does not depend on the draws, so the gradient's expectation is that of the expected reward.

The authors' training code is not public. Here all groups in training share in the sum of their rewards: whether the answer
is right, each of them has a part in. ``penalty`` is the 1 that their tool for inference leaves behind. ``laconic train``
makes steps of iared so (`laconic.training.reinforce`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.core.backbone import HOSTS
from laconic.core.eval_mode import evaluating
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import TokenReduction, reduction_of
from laconic.methods.iared import IARED, KEPT, LOG_PROBABILITY

Part = Literal["interpreter", "blocks"]
Phase = tuple[int | None, Part]  # a group (None: all), and what of it learns
WORKS = 0.5  # any keep rate but 1 says that a group works


@dataclass(frozen=True)
class PolicyStep:
    """A loss whose gradient is the policy gradient, and what it was made of."""

    loss: Tensor
    logits: Tensor  # of the answer by draws, [B, classes], for a cross-entropy beside it
    reward: Tensor  # of the draws, [B, groups]
    baseline: Tensor  # of the decisions of inference, [B, groups]


def policy_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    penalty: float | Sequence[float] = 1.0,
    groups: Sequence[int] | None = None,
) -> PolicyStep:
    """One self-critical step on a model in training mode that `iared` reduces; the ledger is that of the draws.

    Args:
        model: the reduced model.
        images: [B, channels, height, width].
        labels: class numbers [B].
        penalty: what a wrong answer costs, for all groups or for each of those in training.
        groups: those in training, counted from 0 (default: all that are not switched off).

    Raises:
        ValueError: the model is not reduced by iared, or in evaluation mode; no such group works.
    """
    greedy = by_inference(model, images)
    return self_critical(model, greedy, _answer(model, images), labels, penalty=penalty, groups=groups)


@dataclass(frozen=True)
class Greedy:
    """What a model answers by the decisions of inference, and the share of the patches that each group keeps."""

    logits: Tensor
    kept: Tensor  # [B, groups]


def by_inference(model: nn.Module, images: Tensor) -> Greedy:
    """The answer that a model in training mode would give in evaluation mode.

    Raises:
        ValueError: as `policy_step`.
    """
    reduction = reduced_by_iared(model)
    if not reduction.training:
        raise ValueError("iared draws tokens in training mode only, and this model is in evaluation mode; call model.train()")
    with torch.no_grad(), evaluating(model):
        return Greedy(_answer(model, images), _noted(reduction, KEPT))


def self_critical(
    model: nn.Module,
    greedy: Greedy,
    logits: Tensor,
    labels: Tensor,
    *,
    penalty: float | Sequence[float] = 1.0,
    groups: Sequence[int] | None = None,
) -> PolicyStep:
    """As `policy_step`, with the ``logits`` [B, classes] that the model has just answered by its draws."""
    reduction = reduced_by_iared(model)
    kept, log_probability = _noted(reduction, KEPT), _noted(reduction, LOG_PROBABILITY)
    chosen, working = list(range(kept.shape[1]) if groups is None else groups), kept.shape[1]
    if not chosen or any(group not in range(working) for group in chosen):
        raise ValueError(f"groups {chosen} are to be trained, and {working} groups are at work, counted from 0")
    reward = rewards(logits.argmax(1) == labels, kept[:, chosen], penalty)
    baseline = rewards(greedy.logits.argmax(1) == labels, greedy.kept[:, chosen], penalty)
    return PolicyStep(policy_loss(log_probability[:, chosen], reward, baseline), logits, reward, baseline)


def rewards(correct: Tensor, share: Tensor, penalty: float | Sequence[float]) -> Tensor:
    """What answers [B] that kept these shares of the patches [B, groups] are rewarded with, [B, groups]."""
    wrong = torch.as_tensor(penalty, dtype=share.dtype, device=share.device)
    if wrong.dim() and len(wrong) != share.shape[1]:
        raise ValueError(f"penalty has {len(wrong)} values, and {share.shape[1]} groups are in training")
    return torch.where(correct.unsqueeze(1), 1 - share.square(), -wrong)


def policy_loss(log_probability: Tensor, reward: Tensor, baseline: Tensor) -> Tensor:
    """Minus (what is gained over the baseline, by all groups together) times the log-probability of all draws; a mean."""
    gain = (reward - baseline).sum(1, keepdim=True).detach()
    return -(gain * log_probability).sum(1).mean()


def curriculum(model: nn.Module, group: int | None, part: Part = "interpreter") -> None:
    """Set a model up for one phase: groups up to ``group`` work, and only that group's interpreter, or its blocks, learn.

    The paper trains the groups one after the other, each interpreter for 10 epochs and then attention and MLPs for 20. None:
    all groups work and everything learns, as before.

    Raises:
        ValueError: the model is not reduced by iared; there is no such group or part.
    """
    reduction = reduced_by_iared(model)
    at, blocks = reduction.schedule.at, HOSTS[reduction.host_path].blocks(reduction.model)
    if part not in ("interpreter", "blocks"):
        raise ValueError(f"part must be 'interpreter' or 'blocks', not {part!r}")
    if group is None:
        reduction.set_schedule(Schedule.adaptive(at))
        model.requires_grad_(True)
        return
    if group not in range(len(at)):
        raise ValueError(f"this model has groups 0 to {len(at) - 1}, and no group {group}")
    reduction.set_schedule(Schedule.rates([WORKS if other <= group else 1.0 for other in range(len(at))], at))
    model.requires_grad_(False)
    learning = blocks[at[group] : (*at, len(blocks))[group + 1]]
    for module in learning if part == "blocks" else [reduction.reducers[str(at[group])]]:
        module.requires_grad_(True)


def reduced_by_iared(model: nn.Module) -> TokenReduction:
    """The reduction of a model that iared reduces.

    Raises:
        ValueError: another method does, or none.
    """
    reduction = reduction_of(model)
    if not isinstance(reduction.config, IARED):
        raise ValueError(f"this model is reduced by {reduction.config.info.name}; the policy gradient is for iared")
    return reduction


def _answer(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    logits: Tensor = torch.stack(out).mean(0) if isinstance(out, tuple) else out  # of two heads: as at inference
    return logits.float()


def _noted(reduction: TokenReduction, name: str) -> Tensor:
    notes = reduction.entry(reduction.depth).per_image
    if name not in notes:
        raise ValueError("no group of this model is at work: all keep rates are 1; see curriculum(model, None)")
    return notes[name]
