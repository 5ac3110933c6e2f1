"""The training step ``policy-gradient`` and the curriculum of IA-RED2's groups: see `laconic.training.policy_gradient`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laconic.core.token_reduction import TokenReduction, reduction_of
from laconic.training.objective import Change, Objective, Step, StepOptions
from laconic.training.policy_gradient import Part, Phase, by_inference, curriculum, reduced_by_iared, self_critical
from laconic.training.recipe import Recipe


@dataclass(frozen=True)
class PolicyGradientOptions(StepOptions):
    """Options of ``policy-gradient``.

    Args:
        penalty: the cost of a wrong prediction, for all groups or for each group.
        interpreter_epochs: epochs of training for the interpreter of each group, one group after another (published: 10).
        blocks_epochs: epochs of training for the group's blocks afterwards (published: 20). If both are 0, everything is
            trained at once.
    """

    penalty: float | tuple[float, ...] = 1.0
    interpreter_epochs: float = 0.0
    blocks_epochs: float = 0.0

    def __post_init__(self) -> None:
        if min(self.interpreter_epochs, self.blocks_epochs) < 0:
            raise ValueError("step.options: interpreter_epochs and blocks_epochs must be 0 or more")

    @property
    def unused(self) -> bool:
        """True if groups are trained one after another, so that steps do not use all parameters."""
        return bool(self.interpreter_epochs or self.blocks_epochs)

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError if the recipe has a keep-rate warm-in, which sets the schedule too."""
        if self.unused and recipe.method.warms_in:
            raise ValueError("the keep-rate warm-in and step.options.interpreter_epochs both set the schedule; leave one out")


class PolicyGradient(Step):
    """The ordinary objective with drawn tokens, plus the policy gradient of the interpreters in training.

    For a mixed image the correct class is the one with the largest share.
    """

    def __init__(self, objective: Objective, options: PolicyGradientOptions) -> None:
        super().__init__()
        self.objective, self.options = objective, options
        at = reduced_by_iared(objective.student).schedule.at
        if isinstance(options.penalty, tuple) and len(options.penalty) != len(at):
            raise ValueError(f"step.options.penalty has {len(options.penalty)} values, and this model {len(at)} groups")

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """Return the loss and its parts, as `Objective`, with "policy" (the policy-gradient loss), "reward" and "baseline"."""
        model, groups = self.objective.student, self.learning()
        if not groups:
            return self.objective(images, target, patches)
        greedy, answer = by_inference(model, images), self.objective.answer(images)
        parts = self.objective.losses(images, answer, target, patches)
        labels = target if target.dim() == 1 else target.argmax(1)
        penalty = self.options.penalty
        chosen = tuple(penalty[group] for group in groups.values()) if isinstance(penalty, tuple) else penalty
        out = self_critical(model, greedy, answer.logits, labels, penalty=chosen, groups=list(groups))
        policy = {"policy": out.loss, "reward": out.reward.sum(1).mean(), "baseline": out.baseline.sum(1).mean()}
        return {**parts, "loss": parts["loss"] + out.loss, **{name: value.detach() for name, value in policy.items()}}

    def learning(self) -> dict[int, int]:
        """Return the groups whose interpreters are trained: index among the groups turned on -> index among all groups."""
        reduction = reduction_of(self.objective.student)
        reducers: list[Any] = [reduction.reducers[str(block)] for block in reduction.schedule.at]
        working = [group for group, reducer in enumerate(reducers) if reducer.site.keep != 1]
        return {i: group for i, group in enumerate(working) if any(p.requires_grad for p in reducers[group].parameters())}

    def changes(self, models: Sequence[nn.Module], steps: int, epochs: int) -> list[Change]:
        return [Curriculum(models, self.options, steps, epochs)] if self.options.unused else []


class Curriculum:
    """Train one group after another, first its interpreter and then its blocks; for the rest of the run, everything.

    Raises:
        ValueError: the run has too few epochs for all groups.
    """

    def __init__(self, models: Sequence[nn.Module], options: PolicyGradientOptions, steps: int, epochs: int) -> None:
        self.model = models[0]
        self.reductions: list[TokenReduction] = [reduction_of(model) for model in models]
        self.final = self.reductions[0].schedule
        self.fixed = [p for p in self.model.parameters() if not p.requires_grad]
        self.now: Phase | None = None
        self.phases, end = dict[int, Phase](), 0.0  # first step -> phase
        for group in range(len(self.final.at)):
            lengths: dict[Part, float] = {"interpreter": options.interpreter_epochs, "blocks": options.blocks_epochs}
            for part, length in lengths.items():
                if length:
                    self.phases[round(end * steps)] = (group, part)
                end += length
        self.phases[round(end * steps)] = (None, "blocks")
        if end > epochs:
            raise ValueError(
                f"step.options: {len(self.final.at)} groups of interpreter_epochs={options.interpreter_epochs:g} and "
                f"blocks_epochs={options.blocks_epochs:g} are {end:g} epochs, and optimization.epochs is {epochs}"
            )

    def set(self, step: int) -> None:
        """Set the groups turned on and the parameters trained in a step."""
        phase = self.phases[max(start for start in self.phases if start <= step)]
        if phase != self.now:
            self._set(phase)
        self.now = phase

    def _set(self, phase: Phase) -> None:
        group, part = phase
        curriculum(self.model, group, part)
        for parameter in self.fixed:
            parameter.requires_grad_(False)
        schedule = self.final if group in (None, len(self.final.at) - 1) else self.reductions[0].schedule
        for reduction in self.reductions:
            reduction.set_schedule(schedule)

    def arrived(self, step: int) -> bool:
        """Return True if all groups are turned on at that step."""
        return step >= min(start for start, (group, _) in self.phases.items() if group in (None, len(self.final.at) - 1))

    def finish(self) -> None:
        """Turn all groups on, and let all parameters be trained."""
        self._set((None, "blocks"))
