"""Steps by the policy gradient, and the order in which IA-RED2's groups learn: see `laconic.training.policy_gradient`."""

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
        penalty: what a wrong answer costs, for all groups or for each.
        interpreter_epochs: that the interpreter of each group is trained for, group after group (published: 10).
        blocks_epochs: that the group's blocks are trained for afterwards (published: 20). Both 0: everything at once.
    """

    penalty: float | tuple[float, ...] = 1.0
    interpreter_epochs: float = 0.0
    blocks_epochs: float = 0.0

    def __post_init__(self) -> None:
        if min(self.interpreter_epochs, self.blocks_epochs) < 0:
            raise ValueError("step.options: interpreter_epochs and blocks_epochs must be 0 or more")

    @property
    def unused(self) -> bool:
        """Where groups learn one after the other, what is not their turn has no part."""
        return bool(self.interpreter_epochs or self.blocks_epochs)

    def check(self, recipe: Recipe) -> None:
        """Refuse what sets the schedule as well."""
        if self.unused and recipe.method.warms_in:
            raise ValueError("the keep-rate warm-in and step.options.interpreter_epochs both set the schedule; leave one out")


class PolicyGradient(Step):
    """The ordinary objective of the answer by draws, and the policy gradient of the interpreters that are in training.

    An image mixed of several is answered rightly by the class that it has most of.
    """

    def __init__(self, objective: Objective, options: PolicyGradientOptions) -> None:
        super().__init__()
        self.objective, self.options = objective, options
        at = reduced_by_iared(objective.student).schedule.at
        if isinstance(options.penalty, tuple) and len(options.penalty) != len(at):
            raise ValueError(f"step.options.penalty has {len(options.penalty)} values, and this model {len(at)} groups")

    def forward(self, images: Tensor, target: Tensor, patches: Tensor | None = None) -> dict[str, Tensor]:
        """The loss and its parts, as `Objective`; "policy" has the gradient, "reward" and "baseline" are what it is made of."""
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
        """The groups whose interpreters learn: numbers among those at work -> among all."""
        reduction = reduction_of(self.objective.student)
        reducers: list[Any] = [reduction.reducers[str(block)] for block in reduction.schedule.at]
        working = [group for group, reducer in enumerate(reducers) if reducer.site.keep != 1]
        return {i: group for i, group in enumerate(working) if any(p.requires_grad for p in reducers[group].parameters())}

    def changes(self, models: Sequence[nn.Module], steps: int, epochs: int) -> list[Change]:
        return [Curriculum(models, self.options, steps, epochs)] if self.options.unused else []


class Curriculum:
    """Group after group, first its interpreter and then its blocks; what is left of the run, everything.

    Raises:
        ValueError: the run is too short.
    """

    def __init__(self, models: Sequence[nn.Module], options: PolicyGradientOptions, steps: int, epochs: int) -> None:
        self.model = models[0]
        self.compressions: list[TokenReduction] = [reduction_of(model) for model in models]
        self.final = self.compressions[0].schedule
        self.fixed = [p for p in self.model.parameters() if not p.requires_grad]
        self.now: Phase | None = None
        self.phases, end = dict[int, Phase](), 0.0  # first step -> what learns
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
        """Who works and who learns in a step."""
        phase = self.phases[max(start for start in self.phases if start <= step)]
        if phase != self.now:
            self._set(phase)
        self.now = phase

    def _set(self, phase: Phase) -> None:
        group, part = phase
        curriculum(self.model, group, part)
        for parameter in self.fixed:
            parameter.requires_grad_(False)
        schedule = self.final if group in (None, len(self.final.at) - 1) else self.compressions[0].schedule
        for reduction in self.compressions:
            reduction.set_schedule(schedule)

    def arrived(self, step: int) -> bool:
        """Whether all groups work."""
        return step >= min(start for start, (group, _) in self.phases.items() if group in (None, len(self.final.at) - 1))

    def finish(self) -> None:
        """All groups work, and everything may learn."""
        self._set((None, "blocks"))
