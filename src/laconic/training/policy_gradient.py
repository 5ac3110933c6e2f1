"""REINFORCE for IA-RED2's interpreters, one group after another (Pan et al., NeurIPS 2021, arXiv:2106.12620, sec. 3.3).

The model runs twice on each image: with tokens drawn from the interpreters' probabilities, and with the decisions of
inference. For a group that keeps a share u of the patches, the reward is 1 - u^2 if the prediction is correct, else -penalty.
The reward of the first run minus that of the second (self-critical baseline) multiplies the gradient of the log-probability
of the draws. The baseline does not depend on the draws, so the expected gradient is that of the expected reward.

The authors' training code is not public. Here every group in training gets the sum of their rewards, since each of them
contributes to a correct prediction. The default ``penalty`` of 1 is the value in their inference tool. ``laconic train`` uses
these steps for iared (`laconic.training.reinforce`).
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
Phase = tuple[int | None, Part]  # a group (None: all), and which part of it learns
WORKS = 0.5  # any keep rate but 1 turns a group on


@dataclass(frozen=True)
class PolicyStep:
    """A loss whose gradient is the policy gradient, with its rewards."""

    loss: Tensor
    logits: Tensor  # with drawn tokens, [B, classes], for an additional cross-entropy
    reward: Tensor  # with drawn tokens, [B, groups]
    baseline: Tensor  # with the decisions of inference, [B, groups]


def policy_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    penalty: float | Sequence[float] = 1.0,
    groups: Sequence[int] | None = None,
) -> PolicyStep:
    """Compute one self-critical step on a model that `iared` reduces, in training mode.

    Afterwards the model holds the history of the run with drawn tokens.

    Args:
        model: the reduced model.
        images: [B, channels, height, width].
        labels: class indices [B].
        penalty: the cost of a wrong prediction, for all groups or for each group in training.
        groups: groups in training, counted from 0 among those turned on (default: all of these).

    Raises:
        ValueError: the model is not reduced by iared or is in evaluation mode, or a group is not turned on.
    """
    greedy = by_inference(model, images)
    return self_critical(model, greedy, _answer(model, images), labels, penalty=penalty, groups=groups)


@dataclass(frozen=True)
class Greedy:
    """The output of a model with the decisions of inference, and the share of patches that each group keeps."""

    logits: Tensor
    kept: Tensor  # [B, groups]


def by_inference(model: nn.Module, images: Tensor) -> Greedy:
    """Return the output that a model in training mode would give in evaluation mode.

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
    """Compute `policy_step` from the ``logits`` [B, classes] that the model has just computed with drawn tokens."""
    reduction = reduced_by_iared(model)
    kept, log_probability = _noted(reduction, KEPT), _noted(reduction, LOG_PROBABILITY)
    chosen, working = list(range(kept.shape[1]) if groups is None else groups), kept.shape[1]
    if not chosen or any(group not in range(working) for group in chosen):
        raise ValueError(f"groups must be among the {working} groups that are turned on, counted from 0, not {chosen}")
    reward = rewards(logits.argmax(1) == labels, kept[:, chosen], penalty)
    baseline = rewards(greedy.logits.argmax(1) == labels, greedy.kept[:, chosen], penalty)
    return PolicyStep(policy_loss(log_probability[:, chosen], reward, baseline), logits, reward, baseline)


def rewards(correct: Tensor, share: Tensor, penalty: float | Sequence[float]) -> Tensor:
    """Return the rewards [B, groups] of predictions: ``correct`` [B] with the kept shares of patches ``share`` [B, groups]."""
    wrong = torch.as_tensor(penalty, dtype=share.dtype, device=share.device)
    if wrong.dim() and len(wrong) != share.shape[1]:
        raise ValueError(f"penalty has {len(wrong)} values, and {share.shape[1]} groups are in training")
    return torch.where(correct.unsqueeze(1), 1 - share.square(), -wrong)


def policy_loss(log_probability: Tensor, reward: Tensor, baseline: Tensor) -> Tensor:
    """Return -(reward - baseline, summed over groups) * (log-probability of all draws), mean over images."""
    gain = (reward - baseline).sum(1, keepdim=True).detach()
    return -(gain * log_probability).sum(1).mean()


def curriculum(model: nn.Module, group: int | None, part: Part = "interpreter") -> None:
    """Set up one phase of training: turn on the groups up to ``group``; train only its interpreter, or only its blocks.

    The paper trains the groups one after another, each interpreter for 10 epochs and then attention and MLPs for 20. With
    ``group=None`` all groups are turned on and all parameters are trained.

    Raises:
        ValueError: the model is not reduced by iared, or has no such group or part.
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
    """Return the reduction of a model that iared reduces.

    Raises:
        ValueError: the model is reduced by another method, or is not reduced.
    """
    reduction = reduction_of(model)
    if not isinstance(reduction.config, IARED):
        raise ValueError(f"this model is reduced by {reduction.config.info.name}; the policy gradient is for iared")
    return reduction


def _answer(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    logits: Tensor = torch.stack(out).mean(0) if isinstance(out, tuple) else out  # mean of two heads, as at inference
    return logits.float()


def _noted(reduction: TokenReduction, name: str) -> Tensor:
    notes = reduction.entry(reduction.depth).per_image
    if name not in notes:
        raise ValueError("no group of this model is turned on: all keep rates are 1; call curriculum(model, None)")
    return notes[name]
