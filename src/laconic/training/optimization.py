"""Parameter groups, optimiser and learning-rate schedule of a recipe, by timm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from laconic.core.suggestions import nearest_names
from laconic.training.recipe import OptimizationPart

OWN = "laconic."  # the parameters that a method adds to a model


def parameter_groups(model: nn.Module, part: OptimizationPart) -> list[dict[str, Any]]:
    """Return the parameter groups: backbone and method's own, with and without weight decay, per layer with ``layer_decay``.

    Parameters named in ``part.fixed`` are set to require no gradients.

    Raises:
        ValueError: no parameter remains to be trained, or ``fixed`` or ``lr_scales`` matches no parameter of the model.
    """
    names = dict(model.named_parameters())
    for name in part.fixed:
        if name not in names:
            near = nearest_names(name, list(names)) or f" It has {', '.join(list(names)[:4])}, ..."
            raise ValueError(f"optimization.fixed: the model has no parameter {name!r}.{near}")
        names[name].requires_grad_(False)
    for ending in part.lr_scales:
        if not any(name.endswith(ending) for name in names):
            raise ValueError(f"optimization.lr_scales: the name of no parameter of the model ends with {ending!r}")
    scale_of = _layer_scales(model, part) if part.layer_decay else {}
    bare = set(getattr(model, "no_weight_decay", set)())
    groups = dict[tuple[bool, float, float], dict[str, Any]]()
    for name, parameter in names.items():
        if not parameter.requires_grad:
            continue
        backbone = not name.startswith(OWN)
        decay = part.weight_decay if part.decay_all or (parameter.ndim > 1 and name not in bare) else 0.0
        scale = scale_of.get(id(parameter), 1.0) * (part.backbone_lr_scale if backbone else 1.0)
        scale *= next((factor for ending, factor in part.lr_scales.items() if name.endswith(ending)), 1.0)
        facts = {"params": [], "weight_decay": decay, "lr_scale": scale, "backbone": backbone}
        groups.setdefault((backbone, decay, scale), facts)["params"].append(parameter)
    if not groups:
        raise ValueError("there is nothing to train: no parameter of the model requires gradients; see optimization.fixed")
    return list(groups.values())


def _layer_scales(model: nn.Module, part: OptimizationPart) -> dict[int, float]:
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    groups: Iterable[dict[str, Any]] = param_groups_layer_decay(model, layer_decay=part.layer_decay or 1.0)
    return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}


def make_optimizer(model: nn.Module, part: OptimizationPart) -> Optimizer:
    """Create the optimiser of a recipe with timm.

    Raises:
        ValueError: timm has no such optimiser, or there is nothing to train.
    """
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    rate = part.lr * part.batch_size / part.lr_base_size if part.lr_base_size else part.lr
    betas: dict[str, Any] = {"betas": part.betas} if "adam" in part.optimizer or "lamb" in part.optimizer else {}
    groups = parameter_groups(model, part)
    try:
        made: Optimizer = create_optimizer_v2(groups, opt=part.optimizer, lr=rate, weight_decay=part.weight_decay, **betas)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"optimization.optimizer: timm cannot make {part.optimizer!r}: {error}") from error
    for group in made.param_groups:
        group.setdefault("lr_scale", 1.0)
    return made


class LearningRate:
    """timm's cosine schedule with warm-up; a function of the step alone, so that a run can resume at any step."""

    def __init__(self, optimizer: Optimizer, part: OptimizationPart, steps: int) -> None:
        from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]

        self.optimizer, self.part, self.steps = optimizer, part, steps
        self.epochs = part.epochs + part.cooldown_epochs
        per_step, before = part.update == "step", part.warmup == "before"
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=part.epochs - part.warmup_epochs if before else part.epochs,  # type: ignore[arg-type]
            min_lr=part.min_lr,
            warmup_lr=part.warmup_lr,
            warmup_epochs=part.warmup_epochs,  # type: ignore[arg-type]
            warmup_prefix=before,
            cooldown_epochs=part.cooldown_epochs,
            step_on_epochs=not per_step,
            updates_per_epoch=steps if per_step else 0,
        )

    def set(self, step: int) -> float:
        """Set the learning rates for a step (from 0, over all epochs); return the unscaled rate."""
        epoch, schedule = step // self.steps, self.schedule
        if self.part.update == "step":
            schedule.step_update(step)
        else:
            schedule.step(max(0, epoch - 1) if self.part.update == "epoch-late" else epoch)
        group = self.optimizer.param_groups[-1]
        rate: float = group["lr"] / group["lr_scale"] if group["lr_scale"] else 0.0
        cap = 0.0 if epoch < self.part.freeze_backbone_epochs else self.part.backbone_lr_cap
        if cap is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = min(group["lr"], cap) if group["backbone"] else group["lr"]
        return rate
